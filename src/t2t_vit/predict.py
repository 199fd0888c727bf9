"""What a trained model says of images: top-k class names with probabilities."""

from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

import torch
from PIL import Image
from rich.table import Table

from .console import console
from .data import DataError, decode, list_images, open_source
from .plots import plot_predictions
from .settings import require
from .trained import load_model, pick_device

Item = Tuple[str, Callable[[], Image.Image], str]  # name, how to open it, the truth where it is known


def find_images(inputs: List[str]) -> List[Item]:
    """Files, the images of folders (all levels), and `digits` for twelve of the embedded test images.

    Raises:
        DataError: naming everything that is not there, or if no image is found.
    """
    missing = [name for name in inputs if name != 'digits' and not Path(name).exists()]
    if missing:
        raise DataError(f'not there: {", ".join(missing)}')
    items: List[Item] = []
    for name in inputs:
        if name == 'digits':
            source = open_source('digits', 'val')
            items += [(source.name(i), partial(source.open, i), source.classes[source.labels[i]])
                      for i in range(0, len(source.labels), len(source.labels) // 12)[:12]]
            continue
        files = [Path(name)] if Path(name).is_file() else list_images(Path(name))
        items += [(str(file), partial(decode, file), '') for file in files]
    if not items:
        raise DataError(f'no images in {", ".join(inputs)}')
    return items


def predict(
        inputs: List[str],
        checkpoint: str,
        model: Optional[str] = None,
        top_k: int = 5,
        batch_size: int = 32,
        device: str = 'auto',
        picture: Optional[str] = None,
) -> List[Dict[str, float]]:
    """Name what is in images: the most probable classes of each.

    Args:
        inputs: Image files, folders of them, or digits for a few of the embedded test images.
        checkpoint: A run's folder, hf-hub:USER/NAME, or a file in any published layout (then with --model).
        model: The registered name of the model in a file.
        top_k: Classes to name.
        batch_size: Images at once.
        device: cpu, cuda, mps or auto.
        picture: A PNG file to show the first images in, with what they were taken for.
    """
    require(((top_k >= 1, f'top_k is at least 1, got {top_k}'),
             (batch_size >= 1, f'batch_size is at least 1, got {batch_size}')))
    target = pick_device(device)
    items = find_images(inputs)
    net, preprocessing, names = load_model(checkpoint, model)
    net, transform = net.to(target), preprocessing.transform()
    screen, table = console(), Table('image', *(f'{k + 1}.' for k in range(min(top_k, len(names)))))
    results: List[Dict[str, float]] = []
    shown: List[Tuple[Image.Image, str, float, str]] = []
    damaged: List[str] = []
    for start in range(0, len(items), batch_size):
        opened = []
        for name, opener, truth in items[start:start + batch_size]:
            try:
                opened.append((name, preprocessing.convert(opener()), truth))
            except Exception:  # whatever a decoder may raise over damaged bytes
                damaged.append(name)
        if not opened:
            continue
        with torch.inference_mode():
            logits = net(torch.stack([transform(image) for _, image, _ in opened]).to(target))
        probabilities, classes = logits.float().softmax(-1).topk(min(top_k, len(names)))
        for (name, image, truth), ps, cs in zip(opened, probabilities.tolist(), classes.tolist()):
            results.append({names[c]: p for c, p in zip(cs, ps)})
            table.add_row(name, *(f'{names[c]} {100 * p:.1f} %' for c, p in zip(cs, ps)))
            if len(shown) < 24:
                shown.append((image, names[cs[0]], ps[0], truth))
    if not results:
        raise DataError(f'not one image can be read: {", ".join(damaged[:5])}')
    screen.print(table)
    if damaged:
        screen.print(f'{len(damaged)} damaged images left out: {", ".join(damaged[:5])}', soft_wrap=True)
    if picture:
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        plot_predictions(shown, Path(picture))
        screen.print(f'the picture is {picture}', soft_wrap=True)
    return results
