# Three stories of a new user, timed: install to first prediction on own photos, an old checkpoint to a fine-tuned model, and a
# run to ONNX in a process without torch. Transcript of one run: results/first-hour-xeon-2026-11-29.
#   bash scripts/first_hour.sh PHOTOS > transcript.txt 2>&1     # PHOTOS has class folders
cd "$(dirname "$1")"
[ -e photos ] || ln -s "$(basename "$1")" photos
[ -e t2t-vit.git ] || ln -s "$OLDPWD" t2t-vit.git  # started in a clone
one=$(find photos/* -type f | head -1) two=$(find photos/* -type f | tail -1)
unset PYTHONPATH
export OMP_NUM_THREADS=1 COLUMNS=80
run() { echo; echo "\$ $*"; TIMEFORMAT='[%0R s]'; time "$@" 2>&1 | grep -v '^step\|^$'; }
echo "## Install"
run git clone -q t2t-vit.git t2t-vit
run python3 -m venv env
PATH=$PWD/env/bin:$PATH
run pip install -q './t2t-vit[export]'
echo; echo "## Story 1: install to first prediction on own photos"
run t2t-vit train photos --minutes 3 --output runs/photos
run t2t-vit eval runs/photos
run t2t-vit predict "$one" "$two" --checkpoint runs/photos --top-k 2
run python -c "
from t2t_vit import Classifier
for found in Classifier.load('runs/photos').predict(['$one', '$two']):
    print(found.image, found.label, f'{found.probability:.0%}')"
echo; echo "## Story 2: old checkpoint to fine-tuned model"
python - <<'PY'
import timm, torch
import t2t_vit
net = timm.create_model('t2t_vit_6_64.imagenette', pretrained=True)  # in the layout of the release's files
torch.save({'state_dict_ema': net.state_dict()}, 'old.pth.tar')
PY
run t2t-vit finetune photos --weights old.pth.tar --model t2t_vit_6_64 --epochs 5 --output runs/tuned
run t2t-vit predict "$one" "$two" --checkpoint runs/tuned --top-k 2
echo; echo "## Story 3: run to ONNX in a process without torch"
run t2t-vit export -o photos.onnx --checkpoint runs/tuned --pixels image
run python3 -m venv small
run small/bin/pip install -q --no-deps ./t2t-vit
run small/bin/pip install -q fastapi onnxruntime pillow python-multipart uvicorn
run small/bin/python -c "import torch"
small/bin/t2t-vit serve photos.onnx --port 8123 > serve.log 2>&1 &
server=$!
echo; echo "\$ t2t-vit serve photos.onnx --port 8123 &"
for i in $(seq 300); do grep -q Predictions serve.log && break; sleep 0.2; done; cat serve.log
run curl -s -F "image=@$one" http://127.0.0.1:8123/predict
echo; kill -INT $server
