"""A small convolutional network for tiny images, such as the 8×8 digits: seconds to train, BatchNorm and all."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Three 3×3 convolutions with BatchNorm, one halving, mean over the image, linear classifier; 24 k weights."""

    def __init__(self, num_classes: int, in_channels: int = 1, width: int = 16) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            for inputs, outputs in zip((in_channels, *widths[:-1]), widths, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for outputs in widths)
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if index == 0:
                x = F.max_pool2d(x, 2, ceil_mode=True)
        return self.linear(x.mean((2, 3)))


def convnet(num_classes: int, in_channels: int = 1) -> ConvNet:
    """Build the small ConvNet."""
    return ConvNet(num_classes, in_channels)
