"""Train with SGD and with CrAM, prune both in one shot, and draw the accuracy that is left: writes curves.svg."""

import pandas as pd
import torch

import cram_bench as cb

train, test = cb.data.load("digits")
tables = []
for method in ("sgd", "cram+-multi"):
    torch.manual_seed(0)
    model = cb.models.create("convnet", train.num_classes, train.channels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    if method == "cram+-multi":
        optimizer = cb.optim.CrAM(model, optimizer, [cb.compress.Magnitude(s) for s in (0.5, 0.7, 0.9)])
    cb.train.fit(model, optimizer, train, epochs=5, batch_size=128)
    curve = cb.probes.sparsity_curve(model, test, ["global@0.5", "global@0.8", "global@0.9"], calibration=train)
    tables.append(curve.assign(method=method, seed=0))

curves = pd.concat(tables, ignore_index=True)
tuned = curves[curves["calibrated"]]
print(tuned.pivot_table(index="method", columns="sparsity", values="accuracy").round(3).to_string())
cb.plots.accuracy_vs_sparsity(curves).savefig("curves.svg")
