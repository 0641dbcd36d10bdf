"""VGG-16 with BatchNorm for small images (Simonyan and Zisserman, arXiv 1409.1556, configuration D)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Thirteen 3×3 convolutions with BatchNorm, halving after each stage, then one linear classifier."""

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        stages, channels = [], in_channels
        for widths in _STAGES:
            layers: list[nn.Module] = []
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            stages.append(nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True)))
        self.features = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def vgg16_bn(num_classes: int, in_channels: int = 3) -> VGG:
    """VGG-16 with BatchNorm and a single linear classifier, 14.7 M weights."""
    return VGG(num_classes, in_channels)
