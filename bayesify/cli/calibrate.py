"""`bayesify calibrate`: what needs no training: spread of the factors, a temperature, sets of classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from bayesify.cli.models import described, device_of, labeled, load_with_base, new_output
from bayesify.cli.options import (
    AnyModel,
    BatchSize,
    DataOptions,
    Dataset,
    Device,
    DrawSeed,
    Full,
    Samples,
    TrustRemoteCode,
    given,
    with_options,
)
from bayesify.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table

METRICS = ("accuracy", "nll", "ece")


@with_options(data="Data")
def calibrate(
    ctx: typer.Context,
    model: AnyModel,
    dataset: Dataset,
    output: Annotated[Path, typer.Option(help="A new or empty folder for the model.", show_default=False)],
    data: DataOptions,
    split: Annotated[
        str, typer.Option(help="Labeled split that the model was not trained on, or a part of it: test[:500].")
    ] = "validation",
    spread: Annotated[
        str | None,
        typer.Option(
            metavar="low-rank|fisher|search|none",
            help="How far the factors vary: members that are draws around the network (low-rank), or a spread to draw "
            "from (fisher, search: with --samples). By default low-rank for a base model, none for a Bayesian one.",
            show_default=False,
        ),
    ] = None,
    members: Annotated[int, typer.Option(min=1, help="Members of a base model.")] = 8,
    temperature: Annotated[bool, typer.Option(help="Fit a temperature.")] = True,
    sets: Annotated[bool, typer.Option(help="Fit the sets of classes that predict --alpha shows.")] = True,
    samples: Samples = None,
    batch_size: BatchSize = 32,
    seed: DrawSeed = 0,
    device: Device = None,
    full: Full = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Calibrate MODEL, Bayesian or not yet, on DATASET, without training, and save it.

    Half of the split sets the spread and the temperature, the other half the sets; it also tells what this changed.
    """
    new_output(output)
    from rich.console import Console
    from torch.utils.data import DataLoader, random_split

    from bayesify import BayesianModel, bayesify
    from bayesify.calibration.spread import Method
    from bayesify.data.seeding import seeded
    from bayesify.evaluation import collect_labeled
    from bayesify.evaluation.metrics import classification_metrics

    where = device_of(device)
    splits = data.load(dataset, split)
    network, base, preprocessing, classes = load_with_base(model, trust_remote_code)
    bayesian = isinstance(network, BayesianModel)
    if bayesian and (typed := given(ctx, "members")):
        raise ConfigError(f"{typed[0]}: {model} is already converted, with {network.members} members.")
    method = ("none" if bayesian else "low-rank") if spread is None else spread
    if method not in (spreads := (*get_args(Method), "none")):
        raise ConfigError(f"--spread {method} is unknown; expected one of {', '.join(spreads)}.")
    if method in ("fisher", "search") and samples is None:
        raise ConfigError(f"--spread {method} sets what is drawn from; give --samples, here and where you predict.")
    prepared = labeled(splits, next(iter(splits.named)), preprocessing, classes)
    if len(prepared) < 2:
        raise DataError(f"split {split!r} has {len(prepared)} example; two halves are needed.")
    with seeded("calibrate", seed):
        halves = random_split(prepared, [0.5, 0.5])
    fitted, held_out = (DataLoader(half, batch_size, collate_fn=prepared.collate_fn) for half in halves)

    def measured(bnn: Any, draws: int | None) -> dict[str, float]:
        predictive, labels = collect_labeled(bnn.to(where), held_out, samples=draws, seed=seed)
        return classification_metrics(predictive, labels)

    rows = {"as it was": measured(network, samples if bayesian else None)}
    if isinstance(network, BayesianModel):
        bnn = network
    else:
        bnn = described(bayesify(network, members=members, init="ones"), base, classes, preprocessing)
    if method != "none":
        bnn.fit_spread(fitted, method, seed=seed)  # type: ignore[arg-type]
    if temperature:
        bnn.fit_temperature(fitted, samples=samples, seed=seed)
    rows["calibrated"] = measured(bnn, samples)
    if sets:
        bnn.fit_sets(held_out, samples=samples, seed=seed)
    bnn.save_pretrained(output, full=full)
    Console().print(_table(rows, len(halves[1])))
    typer.echo(f"Temperature {bnn.temperature:.3f}. Model: {output}.")


def _table(rows: dict[str, dict[str, float]], examples: int) -> Table:
    from rich.table import Table

    table = Table(title=f"On {examples} examples that set neither spread nor temperature")
    table.add_column("")
    for metric in METRICS:
        table.add_column(metric, justify="right")
    for name, found in rows.items():
        table.add_row(name, *(f"{found[metric]:.4f}" for metric in METRICS))
    return table
