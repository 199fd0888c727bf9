#!/usr/bin/env bash
# The paper's comparisons on a GPU, in pieces: each call works for MINUTES (9 by default), saves and stops; the next goes
# on, also on another machine that has the folder. Ends with 0 when all runs are done, with 75 while some are left.
#   scripts/reproduce_gpu.sh DATA FOLDER [MINUTES] [PROCESSES]
# DATA is train's data.root, as torch/cifar10 or a folder. Two million parameters, 60 epochs at 32 pixels, three seeds,
# bf16; EXTRA='--img_size 64 …' says otherwise, in the first call. PROCESSES (4 by default) share the GPU, which models
# of this size leave mostly idle.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: scripts/reproduce_gpu.sh DATA FOLDER [MINUTES] [PROCESSES]}
out=${2:?usage: scripts/reproduce_gpu.sh DATA FOLDER [MINUTES] [PROCESSES]}
minutes=${3:-9} processes=${4:-4}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
mkdir -p "$out"
plan=()
if [ ! -f "$out/plan.yaml" ]; then
    read -r -a extra <<< "${EXTRA:-}"
    plan=(--data "$data" --parameters 2000000 --reduction 4 --epochs 60 --batch_size 256 --precision bf16 "${extra[@]}")
fi
for i in $(seq "$processes"); do
    python -m t2t_vit.cli reproduce accuracy --output "$out" --minutes "$minutes" --threads 1 "${plan[@]}" \
        > "$out/process-$i.log" 2>&1 &
    [ "$i" -eq 1 ] && sleep 20  # the first writes the plan and the arms
    plan=()
done
wait
python -m t2t_vit.cli reproduce accuracy --output "$out" --minutes 0.001  # the tables; 75 while runs are left
