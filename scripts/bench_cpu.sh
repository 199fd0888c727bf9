#!/usr/bin/env bash
# Measure speed and memory on a CPU, as in results/speed-epyc-*: about half an hour on two idle cores.
#   scripts/bench_cpu.sh FOLDER [PART …]      parts: eager train tiny single sizes compiled family half; by default all
# `half` is for processors with AMX or AVX512-BF16, and is left out on others unless it is named: T2T-ViT-14, t-14 and the
# plain model against vit_small, and T2T-ViT-7 against vit_tiny, in float32, autocast to bf16, and with the model in bf16.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/bench_cpu.sh FOLDER [PART …]}
shift
export PYTHONPATH=tests
bench() {  # bench NAME OPTIONS: writes FOLDER/NAME
    local name=$1
    shift
    "${PYTHON:-.venv/bin/python}" -m t2t_vit.cli bench "$@" --device cpu --output "$out/$name"
}
has_half() {
    "${PYTHON:-.venv/bin/python}" -c 'import sys, torch
from t2t_vit.models.precision import choose_precision, cpu_has_matmuls
print(choose_precision(torch.device("cpu"))[1])
sys.exit(not cpu_has_matmuls(torch.bfloat16))'
}
if [ $# -eq 0 ]; then
    set -- eager train tiny single sizes compiled family
    has_half && set -- "$@" half
fi
for name in "$@"; do
    case $name in
        eager) bench eager t2t_vit_7 t2t_vit_14 t2t_vit_t_14 deit_small_patch16_224 vit_little_patch16_reg1_gap_256 \
            resnet50 mobilenetv2_100 scripts/plain.py:plain_14 scripts/plain.py:plain_t_14 \
            --rounds 7 --seconds 0.4 ;;
        train) bench train t2t_vit_14 t2t_vit_t_14 deit_small_patch16_224 scripts/plain.py:plain_14 \
            --modes '[train]' --rounds 9 --seconds 3 ;;
        tiny) bench tiny t2t_vit_7 --baseline vit_tiny_patch16_224 --rounds 11 --seconds 0.4 ;;
        single) bench single t2t_vit_14 t2t_vit_t_14 --batch_size 1 --modes '[infer]' --rounds 15 --seconds 0.4 \
            --memory false ;;
        sizes) bench sizes t2t_vit_14 t2t_vit_t_14 --batch_size 1 --modes '[infer]' --rounds 3 --seconds 0.2 \
            --img_sizes '[224,384,512,768,1024]' ;;
        compiled) bench compiled t2t_vit_14 t2t_vit_t_14 --compiled '[true]' --rounds 7 --seconds 0.4 ;;
        family) OMP_NUM_THREADS=1 bench family t2t_vit_7 t2t_vit_10 t2t_vit_12 t2t_vit_14 t2t_vit_19 t2t_vit_24 t2t_vit_t_14 \
            t2t_vit_t_19 t2t_vit_t_24 --modes '[train]' --threads 1 --batch_size 4 --rounds 3 --seconds 0.3 --memory false ;;
        half) for precision in float32 bf16 bf16_weights; do
                bench "half/$precision" t2t_vit_14 t2t_vit_t_14 scripts/plain.py:plain_14 --precision $precision \
                    --rounds 9 --seconds 1 --memory false
                bench "half/${precision}_tiny" t2t_vit_7 --baseline vit_tiny_patch16_224 --precision $precision \
                    --rounds 9 --seconds 1 --memory false
            done ;;
        *) echo "unknown part $name" >&2; exit 2 ;;
    esac
done
