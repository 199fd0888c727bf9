#!/usr/bin/env bash
# The best learning rate by width and depth: a small T2T-ViT trained with each of five rates, at 16 pixels, from scratch with the
# settings that `t2t-vit train FOLDER` chooses. Runs that are there are not repeated. Writes OUT/rates.csv.
#   scripts/learning_rates.sh FOLDER OUT
set -euo pipefail
data=${1:?usage: scripts/learning_rates.sh FOLDER OUT}
out=${2:?usage: scripts/learning_rates.sh FOLDER OUT}
shapes='64:4 128:4 256:4 64:16' # width and depth; heads are 32 wide
for shape in $shapes; do
    width=${shape%:*}
    for lr in 5e-4 1e-3 2e-3 4e-3 8e-3; do
        run=$out/$width-${shape#*:}-$lr
        [ ! -f "$run/done" ] || continue
        t2t-vit train "$data" --model t2t_vit_4_16 --imgsz 16 --data.memory true --data.crop_pct 1 --data.workers 0 --threads 1 \
            --data.train_images 10000 --data.val_images 2000 --epochs 3 --optimizer.lr "$lr" --output "$run" \
            --model_args.embed_dim "$width" --model_args.num_heads $((width / 32)) --model_args.depth "${shape#*:}" && touch "$run/done"
    done
done
python - "$out" <<'PYTHON'
import csv
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
runs = []
for file in out.glob('*/metrics.jsonl'):
    width, depth, lr = file.parent.name.split('-', 2)
    last = json.loads(file.read_text().splitlines()[-1])
    runs.append((int(width), int(depth), float(lr), last['train_loss'], last['val_loss'], 100 * last['val_top1']))
with open(out / 'rates.csv', 'w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(['width', 'depth', 'learning rate', 'training loss', 'validation loss', 'top-1 %'])
    writer.writerows((*run[:3], *(f'{value:.4f}' for value in run[3:])) for run in sorted(runs))
PYTHON
