#!/usr/bin/env bash
# The whole GPU measurement, under ten minutes on an H100: exactness on the device, then speed and memory against
# vit_small and the plain reference, bf16 autocast, batch 256, eager and compiled, inference and training step.
#   scripts/bench_gpu.sh FOLDER
# writes exact.txt, bench.csv and README.md into FOLDER. Needs torch, timm and the package's other dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/bench_gpu.sh FOLDER}
mkdir -p "$out"
export PYTHONPATH=src:tests

python - > "$out/exact.txt" <<'PYTHON'
"""Relative distance of the fast form on the GPU from the plain reference in float64 on the CPU, TF32 off and on."""
import timm
import torch
from reference import ReferenceT2TViT, fill, relative_error

import t2t_vit

flat = torch.full((1, 3, 224, 224), 2.6)
images = torch.cat([torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)), flat])
for name, kind in (('t2t_vit_14', 'performer'), ('t2t_vit_t_14', 'transformer')):
    model = timm.create_model(name).eval()
    fill(model)
    plain = ReferenceT2TViT(kind).double().eval()
    plain.load_state_dict(model.state_dict())
    with torch.inference_mode():
        expected = plain(images.double())
        model = model.cuda()
        for tf32 in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
            found = model(images.cuda()).cpu().double()
            print(name, f'tf32={tf32}', f'{relative_error(found, expected):.1e}')
        with torch.autocast('cuda', torch.bfloat16):
            print(name, 'bf16', f'{relative_error(model(images.cuda()).cpu().double(), expected):.1e}')
PYTHON
cat "$out/exact.txt"

python -m t2t_vit.cli bench t2t_vit_14 t2t_vit_t_14 t2t_vit_7 vit_tiny_patch16_224 deit_small_patch16_224 resnet50 \
    tests/reference.py:plain_14 tests/reference.py:plain_t_14 \
    --device cuda --precision bf16 --batch_size 256 --compiled '[false,true]' --rounds 7 --seconds 0.5 --output "$out"
