"""Fine-tune a network at 95 % sparsity with its mask held, let its layers compute at nonzeros only, and time them."""

import torch
from torch import nn

import cram_bench as cb

train, test = cb.data.load("digits")
torch.manual_seed(0)
model = nn.Sequential(
    nn.Flatten(), nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
)
cb.train.fit(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), train, epochs=5, batch_size=128)

masks = cb.compress.apply_(model, "global@0.95")
optimizer = cb.optim.HeldMasks(model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), masks)
timed = cb.deploy.swap_(model, next(train.batches(128))[0])  # each layer is exchanged where it is faster
cb.train.fit(model, optimizer, train, epochs=2, batch_size=128)

print(timed[["layer", "sparsity", "dense_ms", "sparse_ms", "speedup", "taken"]].round(2).to_string(index=False))
cb.deploy.dense_(model)
print(f"{cb.train.evaluate(model, test)['accuracy']:.1%} with {cb.compress.sparsity(model):.1%} zeros")
