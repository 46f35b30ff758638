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
from results import cell, read, summary, write
from rich.console import Console
from rich.table import Table
from torch import nn

from bayesify import FineTuner, bayesify, evaluate
from bayesify.data import ImagePreprocessing, load_data, prepare
from bayesify.evaluation import corruption_sets, evaluate_corruptions
from bayesify.recipes import RECIPES, Recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "integrations" / "cifar"))
from data import MEAN, STD, Images
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


def recipe_of(name: str, shared: dict[str, Any]) -> Recipe:
    """As published, in fewer epochs of smaller batches, with the learning rate scaled by the batch."""
    options = dict(VARIANTS[name] or {})
    recipe = RECIPES[options.pop("recipe", "cifar10-gaussian")]
    rate = recipe.tuning.learning_rate * shared["batch_size"] / recipe.tuning.batch_size
    return recipe.override(**options, **shared, learning_rate=rate, warmup=0.05, log_every=100)


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


def corruptions_of(folder: Path, count: int, cache: Path) -> list[Any]:
    """The 75 corrupted sets of evenly spaced test images, in memory."""
    preprocessing = ImagePreprocessing((3, 32, 32), mean=MEAN, std=STD, crop_pct=1.0)
    prepared = prepare(load_data(str(folder)), "test", preprocessing)
    sets = corruption_sets(prepared, batch_size=250, cache=cache, limit=count)
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
    shared = {"epochs": epochs, "batch_size": batch_size, "precision": "bf16"}
    settings = {**shared, "depth": depth, "width": width, "corrupted": corrupted}
    names = [name.strip() for name in variants.split(";")]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise typer.BadParameter(f"unknown variant {unknown[0]!r}; expected some of {'; '.join(VARIANTS)}.")
    which, parts = map(int, part.split("/"))
    runs = [(name, seed) for seed in range(seeds) for name in names][which - 1 :: parts]
    missing = [run for run in runs if not is_done(output, *run, settings)]
    if missing:
        splits = load_data(str(data))
        images = Images.read(splits.get("train"), splits.input_column, str(splits.label_column))
        test = Images.read(splits.get("test"), splits.input_column, str(splits.label_column))
        sets = corruptions_of(data, corrupted, output / "corrupted")
    for number, (name, seed) in enumerate(missing, 1):
        console.print(f"run {number} of {len(missing)}: {name}, seed {seed}")
        started = time.perf_counter()
        recipe = recipe_of(name, {**shared, "seed": seed})
        model = build(name, recipe, depth, width, seed)
        data_of_run = Images(images.images, images.labels, training=True, seed=seed)
        FineTuner(model, data_of_run, config=recipe.tuning).fit()
        seconds = round(time.perf_counter() - started, 1)
        random = VARIANTS[name] is not None and recipe.rank1.posterior != "deterministic"
        metrics = measure(model, test, sets, recipe.tuning.eval_samples if random else None)
        result = {"variant": name, "options": VARIANTS[name], "seed": seed, "settings": settings}
        write(path_of(output, name, seed), {**result, "train_seconds": seconds, "metrics": metrics})
        console.print({key: round(metrics[key], 4) for key in COLUMNS} | {"train_seconds": seconds})
    write_table(output, names, seeds, settings, console)


def is_done(folder: Path, name: str, seed: int, settings: dict[str, Any]) -> bool:
    found = read(path_of(folder, name, seed))
    return found.get("settings") == settings and found["options"] == VARIANTS[name]


def path_of(folder: Path, name: str, seed: int) -> Path:
    return folder / "runs" / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}.json"


def write_table(folder: Path, names: list[str], seeds: int, settings: dict[str, Any], console: Console) -> None:
    """Print the table of the runs there are, and write it as table.md and table.json."""
    table = Table(title="CIFAR-10, a small WRN from scratch, mean ± standard error")
    head = ["", "seeds", *COLUMNS.values()]
    for column in head:
        table.add_column(column, justify="right" if column else "left")
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    content: dict[str, Any] = {"settings": settings, "torch": str(torch.__version__), "variants": {}}
    for name in names:
        done = [seed for seed in range(seeds) if is_done(folder, name, seed, settings)]
        metrics = [read(path_of(folder, name, seed))["metrics"] for seed in done]
        cells = {key: summary([one[key] for one in metrics]) for key in COLUMNS}
        texts = [name, str(len(metrics)), *(cell(cells[key], 3) for key in COLUMNS)]
        table.add_row(*texts)
        lines.append("| " + " | ".join(texts) + " |")
        content["variants"][name] = {"seeds": len(metrics), **cells, "runs": metrics}
    console.print(table)
    write(folder / "table.json", content, indent=1)
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
