"""The picture of the index page: how far outputs are from the exact result, whatever the mean of x."""

import numpy as np
import torch
from matplotlib import pyplot as plt

import mbn
from mbn.conformance import oracle, ulp

OFFSETS = [10.0**power for power in range(7)]
STYLES = {  # of sizes that leave each to be seen where all are at the same point
    "numpy": {"marker": "o", "markersize": 13, "color": "#0072b2"},
    "torch": {"marker": "s", "markersize": 8, "color": "#e69f00"},
    "jax": {"marker": ".", "markersize": 5, "color": "#1f2933"},
}
noise = np.random.default_rng(0).standard_normal((1024, 8))
zeros, ones = np.zeros(8, np.float32), np.ones(8, np.float32)
errors: dict[str, list[float]] = {"torch.nn": [], **{name: [] for name in STYLES}}
for offset in OFFSETS:
    x = (offset + noise).astype(np.float32)
    exact = oracle.train(x, zeros, ones, ones, zeros, momentum=0.1, eps=1e-5).y
    outputs = {name: mbn.BatchNorm1d(8, backend=name)(x) for name in STYLES}
    outputs["torch.nn"] = torch.nn.BatchNorm1d(8)(torch.from_numpy(x))
    for name, y in outputs.items():
        errors[name].append(ulp.error(mbn.to_numpy(y), exact, "float32"))

figure, panel = plt.subplots(layout="constrained")
panel.loglog(OFFSETS, errors["torch.nn"], "X--", color="#6b7785", markersize=8, label="torch.nn.BatchNorm1d")
for name, style in STYLES.items():
    panel.loglog(OFFSETS, errors[name], linestyle="none", label=f'backend="{name}"', **style)
panel.axhline(ulp.OUTPUT_BOUNDS["float32"], color="#c8442e", label="bound for every backend: 4 ulp")
panel.set(xlabel="mean of x, whose standard deviation is 1", ylabel="largest error of the output, ulp", ylim=(0.1, 1e9))
panel.legend(loc="upper left", frameon=False)
