#!/usr/bin/env bash
# The whole GPU measurement, meant for ten minutes on an H100 and not run on one yet: exactness on the device, then
# speed and memory against vit_small and the plain reference, bf16 autocast, batch 256, eager and compiled, inference
# and training step.
#   scripts/bench_gpu.sh FOLDER
# writes exact.txt, eager/, compiled/ and bars.txt into FOLDER, and fails where the model is further from float64 than
# it may be. Needs torch, timm and the package's other dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/bench_gpu.sh FOLDER}
mkdir -p "$out"
export PYTHONPATH=src:tests

status=0
python - > "$out/exact.txt" <<'PYTHON' || status=$?
"""Relative distance of the fast form on the GPU from the plain reference in float64 on the CPU, TF32 off and on."""
import sys

import timm
import torch
from reference import ReferenceT2TViT, fill, relative_error

import t2t_vit

flat = torch.full((1, 3, 224, 224), 2.6)
halves = flat.clone()
halves[..., 112:] = -2.1
noise = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
bounds = {'float32': 1e-5, 'tf32': 5e-3, 'bf16': 5e-2}  # with two flat halves float32 has 1e-3, see tests/test_exact.py
ended = 0
for name, kind in (('t2t_vit_14', 'performer'), ('t2t_vit_t_14', 'transformer')):
    model = fill(timm.create_model(name).eval())
    plain = ReferenceT2TViT(token_layer=kind).double().eval()
    plain.load_state_dict(model.state_dict())
    with torch.inference_mode():
        model = model.cuda()
        for what, images in (('noise and flat', torch.cat([noise, flat])), ('two flat halves', halves)):
            expected = plain(images.double())
            for precision, bound in bounds.items():
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != 'float32'
                with torch.autocast('cuda', torch.bfloat16, enabled=precision == 'bf16'):
                    error = relative_error(model(images.cuda()).cpu().double(), expected)
                bound = bound if what != 'two flat halves' else max(bound, 5e-3)
                ended |= not error <= bound
                print(f'{name}, {what}, {precision}: {error:.1e}, at most {bound:.0e}')
sys.exit(ended)
PYTHON
cat "$out/exact.txt"

bench() {
    python -m t2t_vit.cli bench "$@" --device cuda --precision bf16 --batch_size 256 --rounds 7 --seconds 0.5
}
bench t2t_vit_14 t2t_vit_t_14 t2t_vit_7 vit_tiny_patch16_224 deit_small_patch16_224 resnet50 \
    tests/reference.py:plain_14 tests/reference.py:plain_t_14 --output "$out/eager"
bench t2t_vit_14 t2t_vit_t_14 t2t_vit_7 --compiled '[true]' --output "$out/compiled"

python - "$out/eager/bench.csv" "$out/compiled/bench.csv" > "$out/bars.txt" <<'PYTHON'
"""What is asked for: ratios to vit_small in speed and memory, and to the plain reference in speed."""
import csv
import sys

rows = [row for file in sys.argv[1:] for row in csv.DictReader(open(file))]
for row in rows:
    name = row['model'].removeprefix('t2t_vit_')
    if name not in ('14', 't_14'):
        continue
    plain = [other for other in rows if other['model'] == f'tests/reference.py:plain_{name}'
             and other['mode'] == row['mode']]
    over = float(row['images_per_second']) / float(plain[0]['images_per_second']) if plain else float('nan')
    print(f"t2t_vit_{name}, {row['mode']}, compiled {row['compiled']}: {float(row['ratio']):.2f} of vit_small "
          f"(asked: {1.0 if name == '14' else 0.9}), {over:.2f} of the plain reference run eagerly (asked: "
          f"{2 if name == '14' else 3}), memory {row['memory_ratio']} of vit_small (asked: at most 1)")
PYTHON
cat "$out/bars.txt"
exit "$status"
