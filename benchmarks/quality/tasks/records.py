"""Mortality in intensive care, from an LSTM that was trained for it."""

from __future__ import annotations

import copy
import sys
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from bayesify import FineTuneConfig, FineTuner
from tasks.task import DATA, Task, batches_of

sys.path.append(str(Path(__file__).parents[3] / "integrations" / "mimic3"))
from network import MortalityLSTM
from records import load_physionet2012

WARDS = {"coronary care": "ICUType=1", "cardiac surgery": "ICUType=2"}
"""Never seen in training, which is on patients of medical and surgical wards."""


def mortality() -> Task:
    """An LSTM trained on medical and surgical wards of set a goes on with them; the shift is two other wards."""
    splits = load_physionet2012(DATA / "physionet2012")
    parts = {}
    for split, episodes in splits.items():
        names = splits["train"].names
        wards = {name: episodes.features[:, -1, names.index(column)] > 0 for name, column in WARDS.items()}
        wards[split] = ~(wards["coronary care"] | wards["cardiac surgery"])
        for name, rows in wards.items():
            if name == split or split == "test":
                parts[name] = TensorDataset(episodes.features[rows], episodes.labels[rows])
    features = parts["train"].tensors[0].shape[-1]
    tuning = FineTuneConfig(steps=200, batch_size=64, eval_every=50)

    @cache
    def pretrained() -> nn.Module:
        torch.manual_seed(0)
        network = MortalityLSTM(features, 64)
        config = FineTuneConfig(epochs=6, batch_size=128, learning_rate=3e-3, seed=0)
        FineTuner(network, parts["train"], parts["validation"], config, progress=False).fit()
        return network

    return Task(
        name="mortality",
        network=lambda seed: copy.deepcopy(pretrained()),
        train=parts["train"],
        validation=parts["validation"],
        tests={"clean": batches_of(parts["test"], 500), **{name: batches_of(parts[name], 500) for name in WARDS}},
        outside={},
        tuning=tuning,
        head="head",
        dropout=("head",),
        new_head=False,
    )
