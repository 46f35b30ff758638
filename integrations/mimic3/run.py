"""Predict in-hospital mortality from the first 48 hours in intensive care, with a plain and a rank-1 Bayesian LSTM.

    python integrations/mimic3/run.py path/to/physionet2012
    python integrations/mimic3/run.py path/to/in-hospital-mortality --posterior cauchy

The folder holds either the Parquet files of PhysioNet 2012 or the in-hospital mortality task of MIMIC-III as the public
mimic3-benchmarks write it. Both networks are trained from scratch, from the same weights.
"""

from __future__ import annotations

import copy
import json
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from network import MortalityLSTM
from records import load
from rich import print
from rich.table import Table

from bayesify import FineTuneConfig, FineTuner, Rank1Config, bayesify, evaluate
from bayesify.files import replacing

METRICS = {"nll": "NLL", "auc_pr": "AUC-PR", "ece": "ECE"}


class Posterior(str, Enum):
    """Families of the factors. Published: normal and Cauchy, each with a prior of the same family."""

    deterministic = "deterministic"
    normal = "normal"
    cauchy = "cauchy"


class Noise(str, Enum):
    """What shares a draw of the factors: nothing (published), or all examples of a member (faster)."""

    example = "example"
    member = "member"


def rank1_config(posterior: Posterior, random_sign: bool, **options: Any) -> Rank1Config:
    """As in the paper: a bias for each member, a prior of the posterior's family; a small spread for Cauchy tails."""
    if random_sign:
        options["init"] = "random-sign"
    if posterior is Posterior.cauchy:
        options.update(prior="cauchy", dropout_rate=1e-6)
    return Rank1Config(posterior=posterior.value, member_bias=True, **options)


def main(
    data: Annotated[Path, typer.Argument(help="Folder of PhysioNet 2012 or MIMIC-III.")],
    output: Annotated[Path, typer.Option(help="Folder for logs, reports and results.")] = Path("runs/mimic3"),
    posterior: Annotated[Posterior, typer.Option(help="Of the factors; deterministic is BatchEnsemble.")] = (
        Posterior.normal
    ),
    members: int = 4,
    prior_scale: Annotated[float, typer.Option(help="Spread of the prior of every factor, around 1.")] = 0.1,
    random_sign: Annotated[bool, typer.Option(help="Start factors at +1 or −1 instead of near 1.")] = False,
    noise: Annotated[Noise, typer.Option(help="One draw of the factors for each example or member.")] = Noise.example,
    hidden: Annotated[int, typer.Option(help="Size of the LSTM's state.")] = 64,
    dropout: Annotated[float, typer.Option(help="Rate on the last state, in both networks.")] = 0.0,
    epochs: int = 8,
    steps: Annotated[int | None, typer.Option(help="Gradient steps, instead of epochs.")] = None,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    samples: Annotated[int, typer.Option(help="Draws a member at evaluation.")] = 25,
    seed: int = 0,
) -> None:
    started = time.perf_counter()
    episodes = load(data)
    for split, part in episodes.items():
        deaths = 100 * part.labels.double().mean()
        print(f"{split}: {len(part):,} stays, {deaths:.1f} % died, {len(part.names)} features")

    torch.manual_seed(seed)
    plain = MortalityLSTM(len(episodes["train"].names), hidden, dropout)
    rank1 = rank1_config(posterior, random_sign, members=members, prior_scale=prior_scale, noise=noise.value)
    bnn = bayesify(copy.deepcopy(plain), rank1)
    config = FineTuneConfig(
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        factor_lr_multiplier=1.0,
        weight_decay=weight_decay,
        eval_samples=None if posterior is Posterior.deterministic else 2,
        seed=seed,
    )
    train, validation = episodes["train"].dataset, episodes["validation"].dataset
    for name, model in (("deterministic", plain), ("bayesian", bnn)):
        result = FineTuner(model, train, validation, config, output=output / name).fit()
        print(f"{name}: best validation NLL {result.best_nll:.4f} nats after step {result.best_step}")

    table = Table("", *(f"{split} {metric}" for split in ("val", "test") for metric in METRICS.values()))
    title = "BatchEnsemble" if posterior is Posterior.deterministic else f"rank-1 {posterior.value}"
    results: dict[str, dict[str, Any]] = {"deterministic": {}, title: {}}
    draws = None if posterior is Posterior.deterministic else samples
    for split in ("validation", "test"):
        folder = output / "report" if split == "test" else None
        evaluation = evaluate(bnn, episodes[split].batches(), baseline=plain, samples=draws, seed=seed, output=folder)
        for row, name in (("deterministic", "deterministic"), (title, "bayesian")):
            results[row][split] = {metric: evaluation.metrics[name].get(metric) for metric in METRICS}
    for name, row in results.items():
        values = [row[split][metric] for split in ("validation", "test") for metric in METRICS]
        table.add_row(name, *("–" if value is None else f"{value:.4f}" for value in values))
    print(table)
    with replacing(output / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"Read {output / 'report' / 'report.md'}. {time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    typer.run(main)
