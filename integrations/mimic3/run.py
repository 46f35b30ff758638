"""Predict in-hospital mortality from the first 48 hours in intensive care, with a plain and a rank-1 Bayesian LSTM.

    python integrations/mimic3/run.py path/to/physionet2012
    python integrations/mimic3/run.py path/to/in-hospital-mortality --recipe mimic3-cauchy

The folder holds either the Parquet files of PhysioNet 2012 or the in-hospital mortality task of MIMIC-III as the public
mimic3-benchmarks write it. Both networks are trained from scratch, from the same weights.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from network import MortalityLSTM
from records import load
from rich import print
from rich.table import Table
from torch import nn

from bayesify import FineTuner, bayesify, evaluate
from bayesify import recipes as published
from bayesify.files import write_json

METRICS = {"nll": "NLL", "auc_pr": "AUC-PR", "ece": "ECE"}

VALIDATION_SAMPLES = 2
"""Draws a member at the validations that choose the state to keep."""


def main(
    data: Annotated[Path, typer.Argument(help="Folder of PhysioNet 2012 or MIMIC-III.")],
    output: Annotated[Path, typer.Option(help="Folder for logs, reports and results.")] = Path("runs/mimic3"),
    recipe: Annotated[str, typer.Option(help="Sets every option of the Bayesian network that is not given.")] = (
        "mimic3-gaussian"
    ),
    posterior: Annotated[str | None, typer.Option(help="Of the factors; deterministic is BatchEnsemble.")] = None,
    members: int | None = None,
    noise: Annotated[str | None, typer.Option(help="One draw of the factors for each example or member.")] = None,
    init: Annotated[str | None, typer.Option(help="Where factors start: ones, normal or random-sign.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the Bayesian network.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of both networks.")] = None,
    steps: Annotated[int | None, typer.Option(help="Gradient steps of both networks, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Of both networks.")] = None,
    samples: Annotated[int | None, typer.Option(help="Draws a member at evaluation.")] = None,
    hidden: Annotated[int, typer.Option(help="Size of the LSTM's state.")] = 64,
    dropout: Annotated[float, typer.Option(help="Rate on the last state of the plain network.")] = 0.5,
    plain_learning_rate: Annotated[float, typer.Option(help="Of the plain network.")] = 1e-3,
    seed: int = 0,
) -> None:
    given = {"posterior": posterior, "members": members, "noise": noise, "init": init, "learning_rate": learning_rate}
    given |= {"epochs": epochs, "steps": steps, "batch_size": batch_size, "eval_samples": samples}
    chosen = published.recipe(recipe).override(**{k: v for k, v in given.items() if v is not None}, seed=seed)
    started = time.perf_counter()
    episodes = load(data)
    for split, part in episodes.items():
        deaths = 100 * part.labels.double().mean()
        print(f"{split}: {len(part):,} stays, {deaths:.1f} % died, {len(part.names)} features")

    torch.manual_seed(seed)
    plain = MortalityLSTM(len(episodes["train"].names), hidden, dropout)
    network = copy.deepcopy(plain)
    network.dropout = nn.Identity()
    bnn = bayesify(network, chosen.rank1)
    draws = chosen.samples
    tuning = replace(chosen.tuning, eval_samples=None if draws is None else VALIDATION_SAMPLES)
    tunings = {"deterministic": replace(tuning, learning_rate=plain_learning_rate), "bayesian": tuning}
    train, validation = episodes["train"].dataset, episodes["validation"].dataset
    for name, model in (("deterministic", plain), ("bayesian", bnn)):
        result = FineTuner(model, train, validation, tunings[name], output=output / name).fit()
        print(f"{name}: best validation NLL {result.best_nll:.4f} nats after step {result.best_step}")

    table = Table("", *(f"{split} {metric}" for split in ("val", "test") for metric in METRICS.values()))
    title = "BatchEnsemble" if draws is None else f"rank-1 {chosen.rank1.posterior}"
    results: dict[str, dict[str, Any]] = {"deterministic": {}, title: {}}
    for split in ("validation", "test"):
        folder = output / "report" if split == "test" else None
        evaluation = evaluate(bnn, episodes[split].batches(), baseline=plain, samples=draws, seed=seed, output=folder)
        for row, name in (("deterministic", "deterministic"), (title, "bayesian")):
            results[row][split] = {metric: evaluation.metrics[name].get(metric) for metric in METRICS}
    for name, row in results.items():
        values = [row[split][metric] for split in ("validation", "test") for metric in METRICS]
        table.add_row(name, *("–" if value is None else f"{value:.4f}" for value in values))
    print(table)
    write_json(output / "results.json", results, indent=1)
    print(f"Read {output / 'report' / 'report.md'}. {time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    typer.run(main)
