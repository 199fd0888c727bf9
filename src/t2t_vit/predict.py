"""What a trained model says of images: top-k class names with probabilities."""

from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from timm.data import get_img_extensions

from .data import DataError, decode, open_source
from .plots import plot_predictions
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
            items += [(source.name(i), lambda i=i: source.open(i), source.classes[source.labels[i]])
                      for i in range(0, len(source.labels), len(source.labels) // 12)[:12]]
            continue
        path = Path(name)
        files = [path] if path.is_file() else sorted(
            p for p in path.rglob('*') if p.suffix.lower() in get_img_extensions())
        items += [(str(file), lambda file=file: decode(file), '') for file in files]
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
    items = find_images(inputs)
    net, preprocessing, names = load_model(checkpoint, model)
    net, transform = net.to(target := pick_device(device)), preprocessing.transform()
    console, table = Console(), Table('image', *(f'{k + 1}.' for k in range(min(top_k, len(names)))))
    results: List[Dict[str, float]] = []
    shown: List[Tuple[Image.Image, str, float, str]] = []
    damaged: List[str] = []
    for start in range(0, len(items), batch_size):
        opened = []
        for name, opener, truth in items[start:start + batch_size]:
            try:
                opened.append((name, preprocessing.convert(opener()), truth))
            except DataError:
                raise
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
    console.print(table)
    if damaged:
        console.print(f'{len(damaged)} damaged images left out: {", ".join(damaged[:5])}')
    if picture and shown:
        plot_predictions(shown, Path(picture))
        console.print(f'the picture is {picture}')
    return results
