"""What the subcommands load and make: models and what belongs to them, labels matched by name, output folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bayesify.errors import ConfigError, DataError, FormatError
from bayesify.files import OUR_FILES, check_output

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bayesify.config import Rank1Config
    from bayesify.data import PreparedDataset, Preprocessing, Splits
    from bayesify.hub import Base
    from bayesify.model import BayesianModel


def summary(bnn: BayesianModel) -> str:
    report = bnn.report
    skipped = f", {len(report.skipped)} weights are left as they are" if report.skipped else ""
    return (
        f"{len(report.converted)} sites carry factors{skipped}; {report.members} members add "
        f"{report.parameters_added:,} parameters to {report.parameters:,} ({100 * report.parameter_overhead:.2f} %)."
    )


def new_output(folder: str | Path) -> Path:
    """A folder to write to that is new or empty."""
    folder = check_output(folder)
    if any((folder / name).exists() for name in OUR_FILES):
        raise FormatError(f"{folder} already holds a model or a run of bayesify; give another folder.")
    return folder


def device_of(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def inputs_of(
    model: nn.Module,
    base: Base,
    kind: Literal["image", "text"],
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> Preprocessing:
    """The preprocessing that a base model expects; its tokenizer or processor lies beside it."""
    from bayesify.data import preprocessing_for

    return preprocessing_for(
        model, base.library, base.id, kind, revision=base.revision, trust_remote_code=trust_remote_code, **options
    )


def kind_of(model: nn.Module) -> Literal["image", "text"]:
    """What a base model takes."""
    return "text" if getattr(model, "main_input_name", None) == "input_ids" else "image"


def load_with_base(model: str, trust_remote_code: bool) -> tuple[nn.Module, Any, Preprocessing, list[str]]:
    """A Bayesian or base model in eval mode, the `Base` of the latter, its preprocessing and its class names."""
    from bayesify.hub import load_model
    from bayesify.model import BayesianModel

    network, base = load_model(model, trust_remote_code=trust_remote_code)
    if not isinstance(network, BayesianModel):
        preprocessing = inputs_of(network, base, kind_of(network), trust_remote_code=trust_remote_code)
        return network.eval(), base, preprocessing, list(base.label_names)
    if network.preprocessing is None:
        raise FormatError(
            f"{model} does not say how its inputs are made (preprocessing); set .preprocessing in Python and save it."
        )
    return network, base, network.preprocessing, network.label_names


def load_with_inputs(model: str, trust_remote_code: bool) -> tuple[nn.Module, Preprocessing, list[str]]:
    """A Bayesian or base model in eval mode, its preprocessing and its class names."""
    network, _, preprocessing, classes = load_with_base(model, trust_remote_code)
    return network, preprocessing, classes


def check_draws(network: nn.Module, model: str, samples: int | None, member_chunk: int | None) -> None:
    """Raise `ConfigError` if draws or members are chosen of a network that has none."""
    from bayesify.model import BayesianModel

    if isinstance(network, BayesianModel):
        return
    for option, value in (("--samples", samples), ("--member-chunk", member_chunk)):
        if value is not None:
            raise ConfigError(f"{option} is for Bayesian models; {model} is none. Make one with `bayesify convert`.")


def told_of_heads(rank1: Rank1Config, base: Base) -> Rank1Config:
    """The same options, with the layers that the base model has without pretrained weights, unless some are named."""
    if rank1.new_layers or not rank1.signed_start:
        return rank1
    return dataclasses.replace(rank1, new_layers=base.new_layers)


def described(
    bnn: BayesianModel, base: Base, classes: Sequence[str], preprocessing: Preprocessing | None
) -> BayesianModel:
    """The same model, with what saving needs: where it came from, its classes, how its inputs are made."""
    from bayesify.hub import origin_of

    bnn.origin = origin_of(bnn.model, base)
    bnn.label_names = list(classes)
    bnn.preprocessing = preprocessing
    return bnn


class Compared(NamedTuple):
    """A model to evaluate and another to list beside it, if any."""

    model: nn.Module
    baseline: nn.Module | None
    name: str
    """What the report calls the model."""
    preprocessing: Preprocessing
    classes: list[str]


def load_compared(model: str, baseline: str | None, device: torch.device, trust_remote_code: bool) -> Compared:
    """Load a model and its baseline. Raises `ConfigError` if they have not the same classes in the same order."""
    from bayesify.model import BayesianModel

    network, preprocessing, classes = load_with_inputs(model, trust_remote_code)
    name = "bayesian" if isinstance(network, BayesianModel) else "deterministic" if baseline is None else "model"
    other = None
    if baseline is not None:
        other, _, names = load_with_inputs(baseline, trust_remote_code)
        if len(names) != len(classes) or (names != classes and not unnamed(names)):
            raise ConfigError(f"{baseline} and {model} have different classes, or the same in another order.")
        other = other.to(device)
    return Compared(network.to(device), other, name, preprocessing, classes)


def classes_of(splits: Splits) -> list[str]:
    """The classes to learn: not those that only out-of-distribution splits have."""
    from bayesify.data.columns import column_values

    def labels(names: Sequence[str]) -> set[int | None]:
        column = splits.label_column
        parts = [splits.named[name] for name in names]
        return {label for part in parts if column in part.column_names for label in column_values(part, str(column))}

    usual = [name for name in splits.named if name not in splits.others]
    elsewhere = labels(list(splits.others)) - labels(usual)
    return [name for label, name in enumerate(splits.label_names) if label not in elsewhere]


def labeled(
    splits: Splits, name: str, preprocessing: Preprocessing, classes: Sequence[str], **options: Any
) -> PreparedDataset:
    """A split with the model's labels, matched by name: a data set may list the same classes in another order.

    Raises:
        DataError: there are no labels, or the model does not know some.
    """
    from bayesify.data import prepare

    prepared = prepare(splits, name, preprocessing, **options)
    names = splits.label_names
    if prepared.labels is None:
        raise DataError(f"split {name!r} has no labels; name their column with --label-column.")
    classes = list(classes)
    if unnamed(classes):
        classes = [str(number) for number in range(len(classes))]
        if len(names) == len(classes) and not any(known.isdecimal() for known in names):
            return prepared  # named classes go by position
    if names == classes or not classes:
        return prepared
    codes = {known: code for code, known in enumerate(classes)}
    unknown = sorted({names[label] for label in set(prepared.labels)} - codes.keys())
    if unknown:
        raise DataError(
            f"split {name!r} has classes that the model does not know: {_some(unknown)}. "
            f"The model knows {_some(classes)}."
        )
    prepared.labels = [codes[names[label]] for label in prepared.labels]
    prepared.num_classes = len(classes)
    return prepared


def unnamed(classes: Sequence[str]) -> bool:
    """Whether a model's classes are only numbered."""
    return all(name in (str(number), f"LABEL_{number}") for number, name in enumerate(classes))


def _some(names: Sequence[str], count: int = 8) -> str:
    more = len(names) - count
    return ", ".join(map(repr, names[:count])) + (f" and {more} more" if more > 0 else "")
