"""The ablations of the paper on CIFAR-10, at a size for two cores: a small WRN from scratch.

    python benchmarks/quality/cifar10.py                # all runs, then the table; goes on where it was interrupted
    python benchmarks/quality/cifar10.py --part 1/2     # the first half of the runs; --part 2/2 beside it

Number of members, average against mixture likelihood, inputs against outputs against both, Gaussian against Cauchy,
beside the deterministic network and BatchEnsemble. Every method sees the same examples in the same number of steps.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from results import cell, read, summary, write_table
from rich.console import Console
from torch import nn

from bayesify import FineTuner, bayesify, evaluate
from bayesify.data import Splits, prepare
from bayesify.evaluation import corruption_sets, evaluate_corruptions
from bayesify.files import write_json
from bayesify.recipes import RECIPES, Recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "integrations" / "cifar"))
from data import PREPROCESSING, Images, load_splits
from wide_resnet import WideResNet

START = {"init": "normal", "init_scale": 0.5}
"""Published, too. The random signs of the recipe take longer to settle than these runs last; they have a row."""

VARIANTS: dict[str, dict[str, Any] | None] = {
    "deterministic": None,
    "BatchEnsemble, K=4": {
        "posterior": "deterministic",
        **START,
        "factor_lr_multiplier": 0.5,
        "weight_decay": 6e-4,
    },
    "Gaussian, K=1": {"members": 1, **START},
    "Gaussian, K=2": {"members": 2, **START},
    "Gaussian, K=4": START,
    "Gaussian, K=8": {"members": 8, **START},
    "Gaussian, K=4, mixture likelihood": {"likelihood": "mixture", **START},
    "Gaussian, K=4, inputs only": {"factors": "inputs", **START},
    "Gaussian, K=4, outputs only": {"factors": "outputs", **START},
    "Cauchy, K=4, 4 samples": {"recipe": "cifar10-cauchy", **START},
    "Gaussian, K=4, random signs": {},
}
"""What differs from the recipe cifar10-gaussian (None: no factors); BatchEnsemble's options are published, too."""

COLUMNS = {"nll": "NLL", "accuracy": "accuracy", "ece": "ECE", "cnll": "cNLL", "ca": "cA", "cece": "cECE"}
COLUMNS |= {"disagreement": "disagreement", "member_nll": "member NLL"}

TUNING = ("epochs", "batch_size", "precision")
"""Settings of a run that are options of its training."""


def recipe_of(name: str, seed: int, settings: dict[str, Any]) -> Recipe:
    """As published, in fewer epochs of smaller batches, with the learning rate scaled by the batch."""
    options = dict(VARIANTS[name] or {})
    recipe = RECIPES[options.pop("recipe", "cifar10-gaussian")]
    rate = recipe.tuning.learning_rate * settings["batch_size"] / recipe.tuning.batch_size
    options |= {key: settings[key] for key in TUNING}
    return recipe.override(**options, seed=seed, learning_rate=rate, warmup=0.05, log_every=100)


def build(name: str, recipe: Recipe, depth: int, width: int, seed: int) -> nn.Module:
    """An untrained model."""
    torch.manual_seed(seed)
    network = WideResNet(depth, width).to(memory_format=torch.channels_last)
    return network if VARIANTS[name] is None else bayesify(network, recipe.rank1)


def measure(model: nn.Module, test: Images, corrupted: list[Any], samples: int | None) -> dict[str, float]:
    """Clean and corrupted metrics; the corrupted ones are means over all sets."""
    options = {"samples": samples, "progress": False, "seed": 0}
    batches = [test.__getitems__(range(start, min(start + 250, len(test)))) for start in range(0, len(test), 250)]
    (clean,) = evaluate(model, batches, **options).metrics.values()
    (report,) = evaluate_corruptions(model, corrupted, **options).summary.values()
    names = {"cnll": "nll", "ca": "accuracy", "cece": "ece"}
    return clean | {ours: report["corrupted"][theirs] for ours, theirs in names.items()}


def corruptions_of(splits: Splits, count: int, cache: Path) -> list[Any]:
    """The 75 corrupted sets of evenly spaced test images, in memory."""
    sets = corruption_sets(prepare(splits, "test", PREPROCESSING), batch_size=250, cache=cache, limit=count)
    return [(corruption, severity, list(batches)) for corruption, severity, batches in sets if severity]


def main(
    data: Annotated[Path, typer.Option(help="Folder of CIFAR-10 as Parquet; default $BAYESIFY_DATA/cifar10.")] = Path(
        os.environ.get("BAYESIFY_DATA", "."), "cifar10"
    ),
    output: Annotated[Path, typer.Option(help="Folder for runs and the table.")] = Path("runs/quality/cifar10"),
    variants: Annotated[str, typer.Option(help="Rows of the table, separated by semicolons.")] = ";".join(VARIANTS),
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0.")] = 3,
    epochs: int = 6,
    batch_size: int = 64,
    depth: int = 10,
    width: int = 1,
    corrupted: Annotated[int, typer.Option(help="Test images that are corrupted.")] = 500,
    part: Annotated[str, typer.Option(help="Which share of the runs to make: 1/2, 2/2.")] = "1/1",
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    console = Console()
    settings: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "precision": "bf16"}
    settings |= {"depth": depth, "width": width, "corrupted": corrupted}
    names = [name.strip() for name in variants.split(";")]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise typer.BadParameter(f"unknown variant {unknown[0]!r}; expected some of {'; '.join(VARIANTS)}.")
    which, parts = map(int, part.split("/"))
    runs = [(name, seed) for seed in range(seeds) for name in names][which - 1 :: parts]
    missing = [run for run in runs if not find(output, *run, settings)]
    if missing:
        make(missing, data, output, settings, console)
    tabulate(output, names, seeds, settings, console)


def make(missing: list[tuple[str, int]], data: Path, folder: Path, settings: dict[str, Any], console: Console) -> None:
    """Train and measure these variants with these seeds."""
    splits = load_splits(str(data))
    columns = splits.input_column, str(splits.label_column)
    train, test = (Images.read(splits.get(name), *columns) for name in ("train", "test"))
    corrupted = corruptions_of(splits, settings["corrupted"], folder / "corrupted")
    for number, (name, seed) in enumerate(missing, 1):
        console.print(f"run {number} of {len(missing)}: {name}, seed {seed}")
        started = time.perf_counter()
        recipe = recipe_of(name, seed, settings)
        model = build(name, recipe, settings["depth"], settings["width"], seed)
        augmented = Images(train.images, train.labels, training=True, seed=seed)
        FineTuner(model, augmented, config=recipe.tuning).fit()
        seconds = round(time.perf_counter() - started, 1)
        metrics = measure(model, test, corrupted, None if VARIANTS[name] is None else recipe.samples)
        result = {"variant": name, "options": VARIANTS[name], "seed": seed, "settings": settings}
        write_json(path_of(folder, name, seed), {**result, "train_seconds": seconds, "metrics": metrics}, indent=None)
        console.print({key: round(metrics[key], 4) for key in COLUMNS} | {"train_seconds": seconds})


def find(folder: Path, name: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The result of a run with these settings and the variant's options of today; {} if it has not been made."""
    found = read(path_of(folder, name, seed))
    return found if found.get("settings") == settings and found["options"] == VARIANTS[name] else {}


def path_of(folder: Path, name: str, seed: int) -> Path:
    return folder / "runs" / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}.json"


def tabulate(folder: Path, names: list[str], seeds: int, settings: dict[str, Any], console: Console) -> None:
    """Print and write the table of the runs there are."""
    rows: list[list[str]] = []
    content: dict[str, Any] = {"settings": settings, "torch": str(torch.__version__), "variants": {}}
    for name in names:
        found = [find(folder, name, seed, settings) for seed in range(seeds)]
        metrics = [run["metrics"] for run in found if run]
        cells = {key: summary([one[key] for one in metrics]) for key in COLUMNS}
        rows.append([name, str(len(metrics)), *(cell(cells[key], 3) for key in COLUMNS)])
        content["variants"][name] = {"seeds": len(metrics), **cells, "runs": metrics}
    title = "CIFAR-10, a small WRN from scratch, mean ± standard error"
    write_table(folder, title, ["", "seeds", *COLUMNS.values()], rows, content, console)


if __name__ == "__main__":
    typer.run(main)
