#!/usr/bin/env bash
# Train T2T-ViT and a ViT (hard split, no token layers) of the same budget from scratch, on CIFAR-10 at its 32 pixels and
# Imagenette at 128, with the same recipe. Interrupted runs resume, finished ones are skipped.
#   scripts/from_scratch.sh [--minutes N] cpu|gpu FOLDER CIFAR10 IMAGENETTE [RUN…]
# With --minutes it stops after that time with exit code 75 if runs are left; the next call resumes.
# CIFAR10 and IMAGENETTE are values of --data.root. RUNs: cifar10-t2t cifar10-vit imagenette-t2t imagenette-vit (all).
# cpu: models of 0.6 to 0.8 million parameters, Imagenette at 64 pixels, few epochs: estimated at two hours on a core.
# gpu: t2t_vit_7, 80 epochs of CIFAR-10 and 60 of Imagenette.
set -euo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '4,6s/^# *//p' "$0" >&2; exit 2; }
deadline=
if [ "${1:-}" = --minutes ]; then
    [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || usage
    deadline=$((SECONDS + 60 * $2))
    shift 2
fi
[ $# -ge 4 ] && [[ $1 = cpu || $1 = gpu ]] || usage
kind=$1 out=$2 cifar10=$3 imagenette=$4
shift 4
[ $# -gt 0 ] || set -- imagenette-t2t imagenette-vit cifar10-t2t cifar10-vit

if [ "$kind" = cpu ]; then
    small=(--model_args.embed_dim 128 --model_args.num_heads 4)
    t2t=("${small[@]}" --model_args.depth 4 --model_args.token_dim 32)
    vit=("${small[@]}" --model_args.depth 5)
    common=(--threads 1 --device cpu --batch_size 64 --augment.mixup 0 --augment.cutmix 0)
    cifar10_epochs=(--epochs 6 --optimizer.warmup_epochs 1)
    imagenette_epochs=(--epochs 20 --optimizer.warmup_epochs 2 --data.img_size 64)
else
    t2t=()
    vit=(--model_args.depth 8)  # about as many parameters as with the tokens-to-token module
    common=(--precision bf16)
    cifar10_epochs=(--epochs 80 --optimizer.warmup_epochs 5)
    imagenette_epochs=(--epochs 60 --optimizer.warmup_epochs 5)
fi

run() {  # run NAME RECIPE ROOT OPTIONS
    local name=$1 recipe=$2 root=$3
    shift 3
    local limit=()
    if [ -n "$deadline" ]; then
        [ "$SECONDS" -lt "$deadline" ] || exit 75
        limit=(timeout --preserve-status --foreground --signal USR1 $((deadline - SECONDS)))
    fi
    "${limit[@]}" "${PYTHON:-.venv/bin/python}" -m t2t_vit.cli train --recipe "$recipe" --data.root "$root" \
        --data.memory true --output "$out/$name" --resume auto "${common[@]}" "$@"
}
for name in "$@"; do
    case $name in
        cifar10-t2t) run "$name" cifar10 "$cifar10" "${cifar10_epochs[@]}" "${t2t[@]}" ;;
        cifar10-vit) run "$name" cifar10 "$cifar10" "${cifar10_epochs[@]}" "${vit[@]}" \
            --model_args.token_layer none --model_args.splits '[[4, 4, 0]]' ;;
        imagenette-t2t) run "$name" imagenette "$imagenette" "${imagenette_epochs[@]}" "${t2t[@]}" ;;
        imagenette-vit) run "$name" imagenette "$imagenette" "${imagenette_epochs[@]}" "${vit[@]}" \
            --model_args.token_layer none --model_args.splits '[[16, 16, 0]]' ;;
        *) echo "unknown run $name" >&2; exit 2 ;;
    esac
done
