"""In-hospital mortality from the first 48 hours: the LSTM table of the paper, on the open data of PhysioNet 2012.

    python benchmarks/quality/physionet2012.py --search   # choose each method's settings, then make the table
    python benchmarks/quality/physionet2012.py            # the table, with the settings chosen before

Every run is kept as a JSON file in the output folder; what is there already is not run again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from results import cell, read, summary, write_table
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from bayesify import FineTuneConfig, FineTuner, Predictive, bayesify
from bayesify.evaluation import classification_metrics, collect
from bayesify.files import write_json

sys.path.insert(0, str(Path(__file__).parents[2] / "integrations" / "mimic3"))
from mean_field import MeanField, train_mean_field
from network import MortalityLSTM
from records import Episodes, load_physionet2012

ENSEMBLE = 5
"""Networks in a deep ensemble; that of seed s holds the deterministic networks of seeds 5s … 5s + 4."""

TITLES = {
    "deterministic": "Deterministic",
    "ensemble": f"Deep ensemble of {ENSEMBLE}",
    "mean-field": "Fully Bayesian (mean-field)",
    "batchensemble": "BatchEnsemble",
    "rank1-normal": "Rank-1 Gaussian",
    "rank1-cauchy": "Rank-1 Cauchy",
}
METRICS = {"nll": "NLL", "auc_pr": "AUC-PR", "ece": "ECE"}
SPLITS = ("validation", "test")

POSTERIORS = {
    "batchensemble": {"posterior": "deterministic"},
    "rank1-normal": {"posterior": "normal", "prior": "normal"},
    "rank1-cauchy": {"posterior": "cauchy", "prior": "cauchy"},
}
COST = {"deterministic": 1, "mean-field": 2, "batchensemble": 4, "rank1-normal": 9, "rank1-cauchy": 9}
"""Time of a run beside a deterministic one, for the estimate of the time left."""

LEARNING_RATES = (3e-3, 1e-3, 1e-2)
WIDE = {"init": "normal", "init_scale": 0.5}
SIGNS = {"init": "random-sign"}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "deterministic": [{"dropout": 0.5}, {"dropout": 0.0}],
    "mean-field": [{"prior_scale": 0.3}, {"prior_scale": 0.1}],
    "batchensemble": [{"factors": WIDE}, {"factors": SIGNS}],
    "rank1-normal": [{"factors": {**start, "prior_scale": 0.5, "dropout_rate": 0.1}} for start in (SIGNS, WIDE)],
    "rank1-cauchy": [{"factors": {**start, "prior_scale": 0.5, "dropout_rate": 1e-6}} for start in (SIGNS, WIDE)],
}
"""What the search tries, six settings a method: each of these with each learning rate. The first is the default."""

SEARCH_SEEDS = (100, 101)
"""Apart from the seeds of the table, so that nothing is chosen on the networks that are reported."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that a run depends on but its seed: what the methods share comes first, what is searched last.

    Args:
        noise: rank-1 factors are drawn for each member ("member"), or for each member and example ("example", as
            published, at several times the price: the LSTM then runs hour by hour instead of in one fused kernel).
        samples: draws a member at evaluation.
        selection: draws a member at the validations, two an epoch, that choose the state to keep.
        factors: options of `bayesify` beside the posterior's family and the number of members.
        prior_scale, spread: of mean-field weights, see `MeanField`.
    """

    method: str
    hidden: int = 64
    epochs: int = 8
    batch_size: int = 128
    members: int = 4
    noise: str = "member"
    samples: int = 25
    selection: int = 2
    kl_annealing: float = 0.67
    weight_decay: float = 0.01
    spread: float = 0.03
    learning_rate: float = LEARNING_RATES[0]
    dropout: float = 0.0
    factors: dict[str, Any] | None = None
    prior_scale: float | None = None

    @property
    def name(self) -> str:
        """The method and a hash of everything that it depends on."""
        own = asdict(self)
        if not self.method.startswith("rank1"):
            del own["noise"]
        return f"{self.method}-{hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]}"


def candidates(method: str, shared: dict[str, Any]) -> list[Setting]:
    """The settings that the search tries for a method, the default first."""
    pairs = itertools.product(VARIANTS[method], LEARNING_RATES)
    return [Setting(method=method, **shared, learning_rate=rate, **variant) for variant, rate in pairs]


def build(setting: Setting, features: int) -> nn.Module:
    """The untrained model of any method but the ensemble."""
    network = MortalityLSTM(features, setting.hidden, setting.dropout)
    if setting.method == "deterministic":
        return network
    if setting.method == "mean-field":
        return MeanField(network, setting.prior_scale or 1.0, setting.spread)
    options = {**POSTERIORS[setting.method], **(setting.factors or {})}
    return bayesify(network, members=setting.members, noise=setting.noise, member_bias=True, **options)


def train(setting: Setting, data: dict[str, Episodes], seed: int) -> nn.Module:
    """The model, trained, at the state with the best validation NLL."""
    torch.manual_seed(seed)
    model = build(setting, data["train"].features.shape[-1])
    config = FineTuneConfig(
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        learning_rate=setting.learning_rate,
        factor_lr_multiplier=1.0,
        weight_decay=setting.weight_decay,
        kl_annealing=setting.kl_annealing,
        eval_every=max(1, len(data["train"]) // setting.batch_size // 2),
        eval_samples=None if setting.method == "batchensemble" else setting.selection,
        seed=seed,
    )
    if isinstance(model, MeanField):
        train_mean_field(model, data["train"].dataset, data["validation"].batches(), config)
    else:
        FineTuner(model, data["train"].dataset, data["validation"].dataset, config, progress=False).fit()
    return model


def log_odds(setting: Setting, model: nn.Module, episodes: Episodes) -> list[float]:
    """log p/(1 − p) of the mixture's probability p of dying, for each episode."""
    samples = None if setting.method in ("deterministic", "batchensemble") else setting.samples
    predictive, _ = collect(model, episodes.batches(), samples=samples, progress=False)
    log_probs = predictive.log_probs.double()
    return [round(value, 6) for value in (log_probs[:, 1] - log_probs[:, 0]).tolist()]


def metrics(odds: Tensor, labels: Tensor) -> dict[str, float | None]:
    """NLL (nats), AUC-PR and ECE of log-odds [networks, N], whose probabilities are averaged."""
    predictive = Predictive(torch.stack([torch.zeros_like(odds), odds], -1)[:, None])
    found = classification_metrics(predictive, labels)
    return {name: found.get(name) for name in METRICS}


# ------------------------------------------------------------------------------------------------ runs


@dataclass(frozen=True)
class Runs:
    """Trained once, kept as files."""

    folder: Path
    data: dict[str, Episodes]
    console: Console

    def read(self, setting: Setting, seed: int) -> dict[str, Any]:
        """What is known of a run: {} if it has not been made."""
        return read(self.path(setting, seed))

    def path(self, setting: Setting, seed: int) -> Path:
        return self.folder / "runs" / f"{setting.name}-seed{seed}.json"

    def make(self, wanted: list[tuple[Setting, int]], splits: tuple[str, ...], title: str) -> None:
        """Make every run that is wanted and not there, with a bar and the time left."""
        missing = {(s.name, seed): (s, seed) for s, seed in wanted if not set(splits) <= set(self.read(s, seed))}
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console,
                      speed_estimate_period=3600) as bar:  # fmt: skip
            task = bar.add_task(title, total=sum(COST[setting.method] for setting, _ in missing.values()))
            for number, (setting, seed) in enumerate(missing.values(), 1):
                bar.update(task, description=f"{title}, run {number} of {len(missing)}: {setting.method}, seed {seed}")
                result = self.run(setting, seed, splits)
                nll = f"{result['validation']['metrics']['nll']:.4f}"
                self.console.print(f"{setting.name}, seed {seed}: validation NLL {nll}, {result['seconds']:.0f} s")
                bar.advance(task, COST[setting.method])

    def run(self, setting: Setting, seed: int, splits: tuple[str, ...]) -> dict[str, Any]:
        started = time.perf_counter()
        model = train(setting, self.data, seed)
        trained = time.perf_counter()
        result: dict[str, Any] = {"setting": asdict(setting), "seed": seed, "torch": str(torch.__version__)}
        for split in splits:
            odds = log_odds(setting, model, self.data[split])
            result[split] = {"metrics": metrics(torch.tensor([odds]), self.data[split].labels), "log_odds": odds}
        result["seconds_per_epoch"] = round((trained - started) / setting.epochs, 3)
        result["seconds"] = round(time.perf_counter() - started, 3)
        write_json(self.path(setting, seed), result, indent=None)
        return result

    def scores(self, method: str, setting: Setting, seed: int, split: str) -> dict[str, float | None]:
        """Metrics of one method at one seed of the table, from the files."""
        odds = [self.read(setting, own)[split]["log_odds"] for own in network_seeds(method, seed)]
        return metrics(torch.tensor(odds), self.data[split].labels)


def network_seeds(method: str, seed: int) -> list[int]:
    """Seeds of the networks that a row of the table is made of."""
    if method == "ensemble":
        return list(range(ENSEMBLE * seed, ENSEMBLE * (seed + 1)))
    return [ENSEMBLE * seed if method == "deterministic" else seed]


def search(runs: Runs, methods: list[str], shared: dict[str, Any]) -> dict[str, Setting]:
    """The setting with the lowest validation NLL, averaged over the search's seeds, for each method."""
    tried = {method: candidates(method, shared) for method in methods}
    wanted = [(setting, seed) for settings in tried.values() for setting in settings for seed in SEARCH_SEEDS]
    runs.make(wanted, ("validation",), "search")
    chosen, record = {}, {}
    for method, settings in tried.items():
        nll = [
            statistics.mean(runs.read(setting, seed)["validation"]["metrics"]["nll"] for seed in SEARCH_SEEDS)
            for setting in settings
        ]
        chosen[method] = settings[nll.index(min(nll))]
        record[method] = [
            {"validation_nll": round(value, 5), "chosen": setting == chosen[method], "setting": asdict(setting)}
            for value, setting in sorted(zip(nll, settings, strict=True), key=lambda pair: pair[0])
        ]
    write_json(runs.folder / "search.json", {**read(runs.folder / "search.json"), **record}, indent=1)
    return chosen


def searched(folder: Path, methods: list[str], shared: dict[str, Any]) -> dict[str, Setting]:
    """The settings that the last search chose, with today's shared options; defaults where there was none."""
    record = read(folder / "search.json")
    chosen = {}
    for method in methods:
        found = [entry["setting"] for entry in record.get(method, []) if entry["chosen"]]
        chosen[method] = Setting(**{**found[0], **shared}) if found else candidates(method, shared)[0]
    return chosen


# ------------------------------------------------------------------------------------------------ the table


def main(
    data: Annotated[Path, typer.Option(help="Folder of set-a.parquet …; default $BAYESIFY_DATA/physionet2012.")] = Path(
        os.environ.get("BAYESIFY_DATA", "."), "physionet2012"
    ),
    output: Annotated[Path, typer.Option(help="Folder for runs and tables.")] = Path("runs/quality/physionet2012"),
    methods: Annotated[str, typer.Option(help="Comma-separated rows of the table.")] = ",".join(TITLES),
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0.")] = 5,
    epochs: int = 8,
    hidden: int = 64,
    batch_size: int = 128,
    members: int = 4,
    noise: Annotated[str, typer.Option(help="Draws of rank-1 factors: one for each member or example.")] = "member",
    samples: Annotated[int, typer.Option(help="Draws a member at evaluation.")] = 25,
    search_first: Annotated[bool, typer.Option("--search", help="Choose settings on validation NLL first.")] = False,
) -> None:
    rows = [name.strip() for name in methods.split(",")]
    if unknown := [name for name in rows if name not in TITLES]:
        raise typer.BadParameter(f"unknown method {unknown[0]!r}; expected some of {', '.join(TITLES)}.")
    torch.set_num_threads(1)
    shared = {"epochs": epochs, "hidden": hidden, "batch_size": batch_size, "members": members}
    shared |= {"noise": noise, "samples": samples}
    source = {name: "deterministic" if name == "ensemble" else name for name in rows}
    trained = list(dict.fromkeys(source.values()))
    for method in trained:  # an option that the library does not take is found now, not in an hour
        for setting in candidates(method, shared):
            build(setting, features=3)
    runs = Runs(output, load_physionet2012(data), Console())
    best = search(runs, trained, shared) if search_first else searched(output, trained, shared)
    chosen = {name: best[source[name]] for name in rows}
    wanted = [(chosen[name], own) for seed in range(seeds) for name in rows for own in network_seeds(name, seed)]
    runs.make(wanted, SPLITS, "table")
    tabulate(runs, chosen, seeds)


def tabulate(runs: Runs, chosen: dict[str, Setting], seeds: int) -> None:
    """Print and write the table, with settings and every seed in its JSON."""
    head = ["method", *(f"{split} {title}" for split in ("val", "test") for title in METRICS.values())]
    rows: list[list[str]] = []
    content: dict[str, Any] = {"seeds": seeds, "torch": str(torch.__version__), "methods": {}}
    for name, setting in chosen.items():
        by_split = {split: [runs.scores(name, setting, seed, split) for seed in range(seeds)] for split in SPLITS}
        cells = {s: {m: summary([v[m] for v in values]) for m in METRICS} for s, values in by_split.items()}
        rows.append([TITLES[name], *(cell(cells[split][metric]) for split in SPLITS for metric in METRICS)])
        first = runs.read(setting, network_seeds(name, 0)[0])
        timing = {key: first[key] for key in ("seconds", "seconds_per_epoch")}
        content["methods"][name] = {"setting": asdict(setting), **timing, **cells, "by_seed": by_split}
    title = f"PhysioNet 2012, mean ± standard error over {seeds} seeds"
    write_table(runs.folder, title, head, rows, content, runs.console)


if __name__ == "__main__":
    typer.run(main)
