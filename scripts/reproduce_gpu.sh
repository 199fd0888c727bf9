#!/usr/bin/env bash
# Run the paper's comparisons on a GPU in pieces: each call works for MINUTES (9 by default), saves and stops. The next call
# with the same arguments resumes, also on another machine that has the folder. Exit code 0: all runs are finished, 75: some
# are left, 1: the rest has failed.
#   scripts/reproduce_gpu.sh DATA FOLDER [MINUTES] [PROCESSES]
# DATA is a value of train's data.root, such as torch/cifar10 or a folder. Two million parameters, 60 epochs at 32 pixels,
# three seeds, bf16; EXTRA='--img_size 64 …' changes this, in every call. PROCESSES (4 by default) share the GPU, which models
# of this size leave mostly idle.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: scripts/reproduce_gpu.sh DATA FOLDER [MINUTES] [PROCESSES]}
out=${2:?usage: scripts/reproduce_gpu.sh DATA FOLDER [MINUTES] [PROCESSES]}
minutes=${3:-9} processes=${4:-4}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
mkdir -p "$out"
read -r -a extra <<< "${EXTRA:-}"
work() {  # work MINUTES
    python -m t2t_vit.cli reproduce accuracy --output "$out" --data "$data" --parameters 2000000 --reduction 4 --epochs 60 \
        --batch_size 256 --precision bf16 --threads 1 --minutes "$1" ${extra[@]+"${extra[@]}"}
}
for i in $(seq "$processes"); do
    work "$minutes" > "$out/process-$i.log" 2>&1 &
    while [ ! -f "$out/plan.yaml" ] && kill -0 $! 2> /dev/null; do sleep 0.2; done  # the first process writes it
done
wait
work 0  # prints the tables and the failed runs
