"""Take any torch model and any batches of (inputs, labels), and find the layer that breaks when it is pruned."""

import torch
from torch import nn

import cram_bench as cb

train, test = cb.data.load("digits")
batches = list(train.batches(128))  # yours: a DataLoader, or any list of (inputs, labels)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Flatten(), nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(8):
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

print(
    cb.probes.sparsity_curve(model, test, ["global@0.8", "uniform@0.8", "2:4"], calibration=batches)
    .round(3)
    .to_string()
)
blame = cb.probes.layer_blame(model, batches, "global@0.9").sort_values("rise")
print(f"pruned to 90 %, layer {blame['layer'].iloc[-1]} raises the loss most")
