#!/usr/bin/env bash
# Measure exactness, speed and memory on a GPU, in about six minutes on an H100: distances from float64 on the device, then
# ratios to vit_small and to the plain model, bf16 autocast, batch 256, eager and compiled, inference and training step.
#   scripts/bench_gpu.sh FOLDER
# writes exact.txt, eager/, compiled/ and ratios.txt, and fails if a distance exceeds its limit. ROUNDS=5 SECONDS_A_TURN=0.3
# makes it faster.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/bench_gpu.sh FOLDER}
python=${PYTHON:-python}
mkdir -p "$out"
export PYTHONPATH=src:tests${PYTHONPATH:+:$PYTHONPATH}

"$python" - > "$out/exact.txt" <<'PYTHON' &
"""Print relative distances from the plain model in float64 on the CPU, TF32 off and on, eager and compiled."""
import sys

import timm
import torch
from filled import fill, relative_error

import t2t_vit

flat = torch.full((1, 3, 224, 224), 2.6)
halves = flat.clone()
halves[..., 112:] = -2.1
noise = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
HALF = {'bf16': (torch.bfloat16, 5e-2), 'fp16': (torch.float16, 1e-2)}
ended = False


def say(what, error, bound):
    global ended
    ended |= not error <= bound
    print(f'{what}: {error:.1e}, at most {bound:.0e}', flush=True)


for name in ('t2t_vit_14', 't2t_vit_t_14'):
    model = fill(timm.create_model(name).eval())
    plain = timm.create_model(name, fast=False).double().eval()
    plain.load_state_dict(model.state_dict())
    with torch.inference_mode():
        model = model.cuda()
        for what, images in (('noise and flat', torch.cat([noise, flat])), ('two flat halves', halves)):
            expected = plain(images.double())
            for tf32 in (False, True):
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
                bound = 5e-3 if tf32 or what == 'two flat halves' else 1e-5  # float32: tests/fast/test_forms.py explains
                error = relative_error(model(images.cuda()).cpu().double(), expected)
                say(f'{name}, {what}, {"tf32" if tf32 else "float32"}', error, bound)
            for precision, (dtype, bound) in HALF.items():
                with torch.autocast('cuda', dtype):
                    error = relative_error(model(images.cuda()).cpu().double(), expected)
                say(f'{name}, {what}, {precision}', error, bound)

    model = fill(timm.create_model(name, depth=2).eval())
    plain = timm.create_model(name, depth=2, fast=False).double().eval()
    plain.load_state_dict(model.state_dict())
    expected = torch.autograd.grad(plain(noise.double()).square().sum(), list(plain.parameters()))
    model = model.cuda()
    parameters = list(model.parameters())
    for compiled in (False, True):
        call = torch.compile(model, fullgraph=True) if compiled else model
        for precision, (dtype, _) in HALF.items():
            with torch.autocast('cuda', dtype):
                loss = call(noise.cuda()).square().sum()
            grads = torch.autograd.grad(loss, parameters)
            found = torch.cat([grad.flatten().double().cpu() for grad in grads])
            error = relative_error(found, torch.cat([grad.flatten() for grad in expected]))
            say(f'{name}, two blocks, all gradients, {precision}{", compiled" if compiled else ""}', error, 5e-2)
sys.exit(ended)
PYTHON
exact=$!

bench() {
    "$python" -m t2t_vit.cli bench "$@" --device cuda --precision bf16 --batch_size 256
}
timed() {
    bench "$@" --rounds "${ROUNDS:-7}" --seconds "${SECONDS_A_TURN:-0.5}"
}
baseline=vit_small_patch16_224
compiled=(t2t_vit_14 t2t_vit_t_14)
for name in "$baseline" "${compiled[@]}"; do  # fill the compiler's cache in parallel; one after another takes minutes
    for mode in infer train; do
        bench "$name" --baseline "$name" --modes "[$mode]" --compiled '[true]' --rounds 1 --seconds 0.01 \
            --memory false > "$out/compile-$name-$mode.log" 2>&1 &
    done
done
wait
status=0
wait "$exact" || status=$?
cat "$out/exact.txt"
timed t2t_vit_14 t2t_vit_t_14 t2t_vit_7 vit_tiny_patch16_224 deit_small_patch16_224 resnet50 \
    scripts/plain.py:plain_14 scripts/plain.py:plain_t_14 --output "$out/eager"
timed "${compiled[@]}" --compiled '[true]' --output "$out/compiled"

"$python" - "$out/eager/bench.csv" "$out/compiled/bench.csv" > "$out/ratios.txt" <<'PYTHON'
"""Print ratios to vit_small in speed and memory, and to the plain model in speed, with their targets."""
import csv
import sys

rows = [row for file in sys.argv[1:] for row in csv.DictReader(open(file))]
for row in rows:
    name = row['model'].removeprefix('t2t_vit_')
    if name not in ('14', 't_14'):
        continue
    plain = [other for other in rows if other['model'] == f'scripts/plain.py:plain_{name}'
             and other['mode'] == row['mode']]
    over = float(row['images_per_second']) / float(plain[0]['images_per_second']) if plain else float('nan')
    print(f"t2t_vit_{name}, {row['mode']}, compiled {row['compiled']}: {float(row['ratio']):.2f} of vit_small "
          f"(target: {1.0 if name == '14' else 0.9}), {over:.2f} of the plain model in eager mode (target: "
          f"{2 if name == '14' else 3}), memory {row['memory_ratio']} of vit_small (target: at most 1)")
PYTHON
cat "$out/ratios.txt"
exit "$status"
