"""The published algorithms as one would first write them down: plain eager float32, a Python loop over tensors.

Written for comparison from the paper (arXiv 2207.14200, algorithm 1) and from nothing else; nothing here uses
`cram_bench`.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms


def sgd_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> float:
    """Take one plain step; return the loss."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def cram_plus_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    labels: Tensor,
    sparsities: Sequence[float],
    rho: float,
) -> float:
    """Take one step of CrAM+ with sparse gradients and global magnitude pruning; return the loss at θ."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(inputs), labels)
    loss.backward()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for _, p in model.named_parameters():
            p.add_(p.grad, alpha=rho)
        masks = global_masks(model, random.choice(sparsities))
        for name, p in model.named_parameters():
            if name in masks:
                p.mul_(masks[name])
    freeze_batchnorm(model, True)
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), labels).backward()
    freeze_batchnorm(model, False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
            if name in masks:
                p.grad.mul_(masks[name])
            p.grad.add_(gradients[name])
    optimizer.step()
    return loss.item()


def global_masks(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Keep the largest magnitudes over all tensors of more than one dimension, found with ``torch.topk``."""
    tensors = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    magnitudes = torch.cat([p.detach().abs().flatten() for p in tensors.values()])
    kept = len(magnitudes) - round(sparsity * len(magnitudes))
    threshold = torch.topk(magnitudes, kept).values[-1]
    return {name: (p.detach().abs() >= threshold).float() for name, p in tensors.items()}


def freeze_batchnorm(model: nn.Module, frozen: bool) -> None:
    """Keep the running statistics as they are during the second pass."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = not frozen


def loader(images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float], batch_size: int) -> DataLoader:
    """Return the usual loader of CIFAR-10: pad, crop, flip and normalise one image at a time in Python."""
    augment = transforms.Compose(
        [
            transforms.RandomCrop(images.shape[-1], padding=images.shape[-1] // 8),
            transforms.RandomHorizontalFlip(),
            transforms.ConvertImageDtype(torch.float32),
            transforms.Normalize(list(mean), list(std)),
        ]
    )
    data = [(augment, image, label) for image, label in zip(images, labels, strict=True)]
    return DataLoader(data, batch_size, shuffle=True, drop_last=True, collate_fn=_collate)  # type: ignore[arg-type]


def _collate(items: Iterable) -> tuple[Tensor, Tensor]:
    items = list(items)
    return torch.stack([augment(image) for augment, image, _ in items]), torch.stack([label for _, _, label in items])


@torch.no_grad()
def curve(
    model: nn.Module, inputs: Tensor, labels: Tensor, sparsities: Sequence[float], batch_size: int
) -> list[float]:
    """Copy, prune and evaluate for every sparsity; return the accuracies."""
    accuracies = []
    for sparsity in sparsities:
        pruned = copy.deepcopy(model).eval()
        for name, mask in global_masks(pruned, sparsity).items():
            pruned.get_parameter(name).mul_(mask)
        correct = 0
        for start in range(0, len(labels), batch_size):
            logits = pruned(inputs[start : start + batch_size])
            correct += (logits.argmax(1) == labels[start : start + batch_size]).sum().item()
        accuracies.append(correct / len(labels))
    return accuracies
