#!/usr/bin/env bash
# Accuracy against the number of training images: a T2T-ViT, a ResNet and a ViT of half a million parameters, at 64 pixels,
# each on 100, 200, 500, 1,500, 4,500 and all images of a set with as many training steps (38,000 images). Settings are
# those that `t2t-vit train FOLDER` chooses, but for smaller images first. Runs that are there are not repeated. Writes
# OUT/curve.csv and OUT/curve.png.
#   scripts/few_images.sh FOLDER OUT [MODEL…]
set -euo pipefail
data=${1:?usage: scripts/few_images.sh FOLDER OUT [MODEL…]}
out=${2:?usage: scripts/few_images.sh FOLDER OUT [MODEL…]}
shift 2
[ $# -gt 0 ] || set -- t2t_vit_r_4_64 resnet18 vit_6_64
sizes='100:380 200:190 500:76 1500:25 4500:8 9469:4' # images and epochs
for size in $sizes; do
    for model in "$@"; do
        run=$out/$model-${size%:*}
        [ ! -f "$run/done" ] || continue
        extra=()
        [ "$model" != resnet18 ] || extra=(--model_args.layers '[1,1,1,1]' --model_args.channels '[20,40,80,160]')
        t2t-vit train "$data" --model "$model" --imgsz 64 --data.memory true --data.crop_pct 1 --data.workers 0 --threads 1 \
            --data.start_scale 1 --data.train_images "${size%:*}" --data.val_images 1000 --epochs "${size#*:}" \
            --output "$run" ${extra[@]+"${extra[@]}"} && touch "$run/done"
    done
done
python - "$out" <<'PYTHON'
import csv
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

out, curves = Path(sys.argv[1]), {}
for file in out.glob('*/metrics.jsonl'):
    model, _, images = file.parent.name.rpartition('-')
    records = [json.loads(line) for line in file.read_text().splitlines()]
    last = records[-1]
    best = max(max(record.get('val_top1', 0), record.get('val_top1_ema', 0)) for record in records)
    curves.setdefault(model, []).append((int(images), last['val_top1'], best, len(records)))
figure = Figure(figsize=(6, 3.6), layout='constrained')
axes = figure.add_subplot(xscale='log', xlabel='training images', ylabel='top-1 in %', title='38,000 images seen, 64 pixels')
with open(out / 'curve.csv', 'w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(['model', 'training images', 'epochs', 'top-1 after the last epoch', 'best top-1'])
    for model, rows in sorted(curves.items()):
        for images, last, best, epochs in sorted(rows):
            writer.writerow([model, images, epochs, f'{last:.4f}', f'{best:.4f}'])
        axes.plot([row[0] for row in sorted(rows)], [100 * row[1] for row in sorted(rows)], 'o-', label=model)
ticks = sorted({row[0] for rows in curves.values() for row in rows})
axes.set_xticks(ticks, [f'{tick:,}' for tick in ticks])
axes.minorticks_off()
axes.grid(alpha=0.3)
axes.legend()
figure.savefig(out / 'curve.png', dpi=120)
PYTHON
