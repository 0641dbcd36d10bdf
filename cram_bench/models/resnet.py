"""Residual networks in their CIFAR form (He et al., arXiv 1512.03385): a 3×3 stem, no first pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut.

    Where the shape changes, the shortcut either subsamples and pads with zero channels (option A of the paper's
    section 4.2, no weights) or is a 1×1 convolution with BatchNorm (option B).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, outputs - inputs
        self.shortcut: nn.Module | None = None
        if project and (stride != 1 or inputs != outputs):
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            return F.relu(out + self.shortcut(x))
        if self.padding:
            before = self.padding // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.padding - before))
        return F.relu(out + x)


class ResNet(nn.Module):
    """A CIFAR residual network: stem, stages that halve the image and double the channels, mean, classifier.

    Args:
        blocks: blocks per stage.
        width: channels of the first stage.
        num_classes: outputs.
        in_channels: image channels.
        project: shortcuts with weights (option B).
    """

    def __init__(
        self, blocks: tuple[int, ...], width: int, num_classes: int, in_channels: int = 3, project: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages, channels = [f"layer{stage + 1}" for stage in range(len(blocks))], width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            layers = []
            for stride in strides:
                layers.append(Block(channels, outputs, stride, project))
                channels = outputs
            self.add_module(self.stages[stage], nn.Sequential(*layers))
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet20(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-20: three stages of three blocks, 16 to 64 channels, 0.27 M weights (arXiv 1512.03385, section 4.2).

    Its shortcuts have no weights, as the original's for CIFAR; the authors of CrAM use `resnet20_projection`.
    """
    return ResNet((3, 3, 3), 16, num_classes, in_channels)


def resnet20_projection(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-20 as the authors of CrAM train it (arXiv 2207.14200, their code): shortcuts with weights, 272,474 in all.

    Convolutions begin as N(0, 2/(k²·outputs)), the classifier as torch has it.
    """
    model = ResNet((3, 3, 3), 16, num_classes, in_channels, project=True)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    model.linear.reset_parameters()
    return model


def resnet18(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-18 with a CIFAR stem: four stages of two blocks, 64 to 512 channels, 11.2 M weights."""
    return ResNet((2, 2, 2, 2), 64, num_classes, in_channels, project=True)
