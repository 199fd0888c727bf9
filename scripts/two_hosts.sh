#!/usr/bin/env bash
# Train on two hosts simulated on one machine: two network namespaces connected by a virtual cable, gloo. The second host is
# cut off in the middle and its processes die. After it returns, the run resumes from the last saved state and must reach the
# weights of an uninterrupted run, bit for bit. Then an elastic run of one or two hosts loses the second host, goes on with
# one, regains it and goes on with two, without anybody's help.
#   sudo scripts/two_hosts.sh [FOLDER]
# Needs Linux, root and iproute2. PYTHON names the interpreter, MINUTES (10) limits each part.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-runs/two-hosts}")
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
rm -rf "$out"
mkdir -p "$out"

clean() {
    ip netns pids t2t_a 2> /dev/null | xargs -r kill -9 || true
    ip netns pids t2t_b 2> /dev/null | xargs -r kill -9 || true
    ip netns delete t2t_a 2> /dev/null || true
    ip netns delete t2t_b 2> /dev/null || true
}
trap clean EXIT
clean
ip netns add t2t_a
ip netns add t2t_b
ip link add t2t_va netns t2t_a type veth peer name t2t_vb netns t2t_b
for host in a b; do
    address=$([ "$host" = a ] && echo 10.77.0.1/24 || echo 10.77.0.2/24)
    ip -n "t2t_$host" address add "$address" dev "t2t_v$host"
    ip -n "t2t_$host" link set "t2t_v$host" up
    ip -n "t2t_$host" link set lo up
done

host() {  # host NAME RANK FOLDER
    OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME="t2t_v$1" TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 timeout $((${MINUTES:-10} * 60)) \
        ip netns exec "t2t_$1" "$python" -m torch.distributed.run \
        --nnodes 2 --node_rank "$2" --nproc_per_node 1 --master_addr 10.77.0.1 --master_port 29511 \
        -m t2t_vit.cli train --recipe digits --epochs 3 --optimizer.warmup_epochs 1 --batch_size 256 --device cpu \
        --model_args.depth 1 --save_minutes 0 --output "$3" --resume auto
}

both() {  # both FOLDER LOGS: run two hosts to the end; both must succeed
    host a 0 "$1" > "$2a.log" 2>&1 & local first=$!
    host b 1 "$1" > "$2b.log" 2>&1 & local second=$!
    wait "$first" && wait "$second" && return
    echo "a host failed; the end of its log:" >&2
    tail -n 20 "$2a.log" "$2b.log" >&2
    exit 1
}

echo 'uninterrupted: two hosts'
both "$out/whole" "$out/whole-"

echo 'interrupted: the second host is cut off after step 6'
host a 0 "$out/parts" > "$out/parts-a1.log" 2>&1 & first=$!
host b 1 "$out/parts" > "$out/parts-b1.log" 2>&1 & second=$!
deadline=$((SECONDS + ${MINUTES:-10} * 60))
until compgen -G "$out/parts/checkpoints/step-0000000[6-9].pt" > /dev/null; do
    if [ "$SECONDS" -ge "$deadline" ] || ! kill -0 "$first" "$second" 2> /dev/null; then
        echo 'the run ended, or took too long, before its sixth step' >&2
        tail -n 20 "$out/parts-a1.log" "$out/parts-b1.log" >&2
        exit 1
    fi
    sleep 0.05
done
ip -n t2t_b link set t2t_vb down
ip netns pids t2t_b | xargs -r kill -9
wait "$second" || true
# the first host would wait until the connection times out; a cluster manager would end it sooner
sleep 2
ip netns pids t2t_a | xargs -r kill -9
wait "$first" || true

echo 'the second host is back: both start again'
ip -n t2t_b link set t2t_vb up
ip -n t2t_b address replace 10.77.0.2/24 dev t2t_vb
both "$out/parts" "$out/parts-again-"
grep -h 'from epoch' "$out/parts-again-a.log"

"$python" - "$out" <<'PYTHON'
import sys
from pathlib import Path

import torch

from t2t_vit.train.state import load_state

whole, parts = (load_state(Path(sys.argv[1]) / name / 'checkpoints')[0] for name in ('whole', 'parts'))
same = all(torch.equal(whole['model'][key], parts['model'][key]) for key in whole['model'])
print(f'{whole["processes"]} processes on two hosts: weights after the interruption',
      'equal those of the uninterrupted run, bit for bit' if same else 'DIFFER')
sys.exit(not same)
PYTHON

elastic() {  # elastic NAME: join the elastic run on host NAME
    OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME="t2t_v$1" TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 timeout $((${MINUTES:-10} * 60)) \
        ip netns exec "t2t_$1" "$python" -m torch.distributed.run \
        --nnodes 1:2 --nproc_per_node 1 --max_restarts 20 --local_addr "$([ "$1" = a ] && echo 10.77.0.1 || echo 10.77.0.2)" \
        --rdzv_backend c10d --rdzv_id t2t --rdzv_endpoint 10.77.0.1:29512 \
        --rdzv_conf "is_host=$([ "$1" = a ] && echo true || echo false),last_call_timeout=5,join_timeout=120" \
        -m t2t_vit.cli train --recipe digits --epochs "${EPOCHS:-100}" --optimizer.warmup_epochs 1 --batch_size 256 \
        --device cpu --model_args.depth 1 --save_minutes 0 --output "$out/elastic" --resume auto
}

saved() {  # saved STEP: wait until a state of a later step is there
    local end=$((SECONDS + ${MINUTES:-10} * 60)) last
    while true; do
        last=$(ls "$out/elastic/checkpoints" 2> /dev/null | grep -o '[0-9]\{8\}' | tail -n 1 || true)
        [ "$((10#${last:-0}))" -gt "$1" ] && break
        if [ "$SECONDS" -ge "$end" ] || ! kill -0 "$first" 2> /dev/null; then
            echo "no state after step $1" >&2
            tail -n 20 "$out/elastic-a.log" >&2
            exit 1
        fi
        sleep 0.2
    done
    step=$((10#$last))
}

echo 'elastic: two hosts, then the second one is cut off'
elastic a > "$out/elastic-a.log" 2>&1 & first=$!
elastic b > "$out/elastic-b1.log" 2>&1 & second=$!
saved 20
ip netns pids t2t_b | xargs -r kill -9
wait "$second" || true
saved $((step + 20))
echo "one host went on to step $step; the second one is back"
elastic b > "$out/elastic-b2.log" 2>&1 & second=$!
wait "$first"
wait "$second"
grep -hoE '= [0-9]+ processes x|resumed?.*from epoch.*' "$out/elastic-a.log"
tail -n 1 "$out/elastic-a.log"
[ "$(grep -c '= 2 processes x' "$out/elastic-a.log")" -ge 2 ] && grep -q '= 1 processes x' "$out/elastic-a.log"
