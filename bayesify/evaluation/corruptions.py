"""How accuracy and calibration hold up as images get worse: 15 corruptions at 5 severities."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import nn

from bayesify.data import PreparedDataset
from bayesify.errors import ConfigError, DataError, FormatError
from bayesify.evaluation.collect import collect_labeled, with_baseline
from bayesify.evaluation.corrupted import SEVERITIES, CorruptionPlan, CorruptionSet
from bayesify.evaluation.corruption_report import ROW_KEYS, CorruptionReport, check_reference, read_row
from bayesify.evaluation.metrics import metrics_from_scores
from bayesify.evaluation.scores import score
from bayesify.evaluation.tables import finite_or_text
from bayesify.files import write_text
from bayesify.progress import progress_bar

LOG_VERSION = 1
LOG_FILE = "corruptions.jsonl"

Sets = Mapping[tuple[str, int], Iterable[Any]] | Iterable[tuple[str, int, Iterable[Any]]]


def evaluate_corruptions(
    model: Any,
    data: PreparedDataset | Sets,
    *,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    samples: int | None = None,
    member_chunk: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    workers: int = 0,
    cache: str | Path | None = None,
    baseline: Any = None,
    name: str = "bayesian",
    output: str | Path | None = None,
    limit: int | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
    reference_errors: Mapping[str, float] | None = None,
) -> CorruptionReport:
    """Measure a model on corrupted images, if wanted beside a baseline.

    With `output`, each finished set is kept there, and the same call goes on after an interruption; more corruptions
    or severities may be asked for later.

    Args:
        model: a Bayesian model or an ordinary network that classifies images, see `collect`.
        data: images to be corrupted here (see `CorruptedImages` for how), whose clean metrics stand beside; or sets
            that are corrupted already (ImageNet-C, say): {(corruption, severity): batches} or an iterable of
            (corruption, severity, batches), with severity 0 for clean data. It is up to the caller that such sets
            are the same when an evaluation goes on.
        corruptions, severities, batch_size, workers, cache, limit: see `corruption_sets`; for images only. Without a
            cache, images are corrupted once for each model.
        samples: draws per member; None is the posterior mean.
        member_chunk: members computed at a time; None is as many as are expected to cost least.
        seed: of the corruptions and of the draws.
        baseline: a network to compare with, usually the one before conversion; listed as "deterministic".
        name: what the report calls the model.
        output: folder for corruptions.json, corruptions.md, corruptions.png and the log of finished sets.
        progress: show a bar with the time left over all sets on stderr.
        device: where the inputs go; the default is where each model is.
        reference_errors: {corruption: mean error of a reference network}, for the mCE; `ALEXNET_ERRORS` for ImageNet.

    Raises:
        ConfigError: an option has no meaning, or the package `imagecorruptions` is missing.
        DataError: the data are no labeled images, do not fit the model, or cannot be read again.
        FormatError: `output` holds an evaluation with other settings.
    """
    models = with_baseline(model, name, baseline)
    reference = dict(reference_errors or {})
    settings: dict[str, Any] = {"seed": seed, "samples": samples, "models": list(models)}
    if output is not None:
        settings["models"] = {title: _digest(network) for title, network in models.items()}
    if isinstance(data, PreparedDataset):
        plan = CorruptionPlan(data, corruptions, severities, seed, limit)
        check_reference(reference, plan.corruptions, plan.severities)
        if data.labels is None:
            raise DataError("the data have no labels to compare with; name their column with label_column.")
        sets: Iterable[Any] = plan.sets(batch_size, workers, cache)
        settings |= {"examples": len(plan.rows), "versions": plan.versions}
        if samples is not None:
            settings["batch_size"] = batch_size  # the draws of an example depend on its batch
        if output is not None:
            settings |= _digests(plan, data.labels)
    else:
        if corruptions is not None or cache is not None or limit is not None or tuple(severities) != SEVERITIES:
            raise ConfigError(
                "corruptions, severities, cache and limit are for images; the sets given are made already."
            )
        sets = _ready_made(data)

    log = _Log(None if output is None else Path(output) / LOG_FILE, settings)
    options = {"samples": samples, "member_chunk": member_chunk, "seed": seed, "device": device}
    rows = _measure(models, sets, reference, log, progress, options)
    if not rows:
        raise DataError("there is no set to evaluate: the data are empty.")
    report = CorruptionReport(rows, settings, reference)
    if output is not None:
        report.save(output)
    return report


def _measure(
    models: dict[str, Any],
    sets: Iterable[Any],
    reference: Mapping[str, float],
    log: _Log,
    progress: bool,
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """A row for each set and model, out of the log if it is there; `options` are those of `collect`."""
    rows = []
    total = _total(sets, len(models))
    # The speed is that of the last hour: some corruptions take a hundred times as long as others.
    shown = {"console": Console(stderr=True), "transient": True, "speed_estimate_period": 3600.0}
    with progress_bar(disable=not progress, **shown) as bar:
        task = bar.add_task("", total=total)
        for entry in sets:
            corruption, severity, batches = _checked(entry, reference, len(models))
            for title, network in models.items():
                bar.update(task, description=f"{corruption} {severity}, {title}" if severity else f"clean, {title}")
                row = log.rows.get((title, corruption, severity))
                if row is None:
                    counted = _counted(batches, bar, task)
                    predictive, targets = collect_labeled(network, counted, progress=False, **options)
                    row = {"model": title, "corruption": corruption, "severity": severity}
                    row |= {"examples": len(predictive), **metrics_from_scores(score(predictive, targets))}
                    log.keep(row)
                elif total is not None:
                    bar.update(task, total=(total := total - len(batches)))  # type: ignore[arg-type]
                rows.append(row)
    return rows


def _ready_made(data: Sets) -> Iterable[Any]:
    if isinstance(data, Mapping):
        return [(*key, batches) if isinstance(key, tuple) else (key, batches) for key, batches in data.items()]
    return data


def _checked(entry: Any, reference: Mapping[str, float], models: int) -> CorruptionSet:
    try:
        corruption, severity, batches = entry
    except (TypeError, ValueError):
        corruption = severity = batches = None
    if not isinstance(corruption, str) or type(severity) is not int or severity not in (0, *SEVERITIES):
        raise DataError(
            "expected sets (corruption, severity 0 to 5, batches) or {(corruption, severity): batches}; "
            f"found {corruption!r}, {severity!r}."
        )
    if models > 1 and isinstance(batches, Iterator):
        raise DataError(
            f"the batches of {corruption} {severity} are an iterator and can be read once, but the baseline reads "
            "them again. Give a DataLoader or a list of batches."
        )
    if severity:
        check_reference(reference, [corruption])
    return CorruptionSet(corruption, severity, batches)  # type: ignore[arg-type]


class _Log:
    """Finished sets: a first line with the settings, then one line a set. Each writing replaces the file whole."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.rows: dict[tuple[str, str, int], dict[str, Any]] = {}
        self.head = json.loads(json.dumps({"format_version": LOG_VERSION, "settings": settings}))
        if path is not None and path.exists():
            self._read(path)

    def keep(self, row: dict[str, Any]) -> None:
        self.rows[row["model"], row["corruption"], row["severity"]] = row
        if self.path is not None:
            lines = [self.head, *finite_or_text(list(self.rows.values()))]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def _read(self, path: Path) -> None:
        try:
            head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            version, known = head["format_version"], head["settings"]
            self.rows = {tuple(row[key] for key in ROW_KEYS): read_row(row) for row in rows}  # type: ignore[misc]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path}: not a log of bayesify ({error}). Delete it to start anew.") from error
        if version != LOG_VERSION:
            raise FormatError(f"{path}: format_version is {version!r}; expected {LOG_VERSION}.")
        now = self.head["settings"]
        if other := sorted(key for key in now.keys() | known.keys() if now.get(key) != known.get(key)):
            changes = ", ".join(f"{key} (then {_brief(known.get(key))}, now {_brief(now.get(key))})" for key in other)
            raise FormatError(f"{path}: other settings: {changes}. Give another folder, or delete it to start anew.")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _digest(model: Any) -> str | None:
    """Hex digest of all parameters and buffers; None for what is not a module."""
    if not isinstance(model, nn.Module):
        return None
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        if plain.numel():
            digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _digests(plan: CorruptionPlan, labels: Sequence[Any]) -> dict[str, str]:
    """Hex digests of the images and of their labels."""
    chosen = repr([labels[row] for row in plan.rows]).encode()
    return {"images": plan.fingerprint, "labels": hashlib.sha256(chosen).hexdigest()}


def _total(sets: Iterable[Any], models: int) -> int | None:
    """Batches of all sets and models, if the sets and their batches can be counted."""
    try:
        return models * sum(len(batches) for _, _, batches in sets) if isinstance(sets, Sequence) else None  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _counted(batches: Iterable[Any], bar: Progress, task: TaskID) -> Iterator[Any]:
    for batch in batches:
        yield batch
        bar.advance(task)
