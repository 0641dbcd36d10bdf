"""Prune one network by magnitude and by pruners that look, and choose among them on held-out training data."""

import torch

import cram_bench as cb

train, test = cb.data.load("digits")
rest, held_out = train.split(300)
torch.manual_seed(0)
model = cb.models.create("convnet", train.num_classes, train.channels)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
cb.train.fit(model, optimizer, rest, epochs=5, batch_size=128)

specifications = ["global@0.9", "obert(gradients=64)@0.9", "greedy(gradients=64)@0.9", "exactobs(samples=256)@0.9"]
curve = cb.probes.sparsity_curve(model, held_out, specifications, calibration=rest)
tuned = curve[curve["calibrated"] & (curve["sparsity"] > 0)]
print(tuned[["pattern", "accuracy", "loss", "seconds"]].round(3).to_string(index=False))

best = specifications[int(tuned["loss"].argmin())]
masks = cb.prune.apply_(model, best, batches=rest)
cb.compress.tune_batchnorm(model, rest.calibration())
print(f"{best}: {cb.train.evaluate(model, test)['accuracy']:.1%} of the test images, {masks.sparsity:.0%} zeros")
