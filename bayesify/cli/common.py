"""What the subcommands share: options made from config classes, labels matched by name, output folders."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from bayesify.errors import ConfigError, DataError, FormatError
from bayesify.files import OUR_FILES, check_output

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bayesify.data import PreparedDataset, Preprocessing, Splits
    from bayesify.hub import Base
    from bayesify.model import BayesianModel

FLAGS = {"trackers": "--tracker"}
"""Options whose name is not that of the field."""

Model = Annotated[str, typer.Argument(help="A timm name, a Hub id or a folder.", show_default=False)]
Dataset = Annotated[
    str, typer.Argument(help="A Hub id, a folder of images, or Parquet, CSV or JSON files.", show_default=False)
]
NumLabels = Annotated[
    int | None, typer.Option(help="Give the base model a new head with this many classes.", show_default=False)
]
NoPretrained = Annotated[
    bool, typer.Option("--no-pretrained", help="Build the base model with random weights.", show_default=False)
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run model code that a Hub repository or folder brings along.", show_default=False
    ),
]
Full = Annotated[
    bool,
    typer.Option("--full", help="Save all weights, not only what differs from the base model.", show_default=False),
]
Samples = Annotated[
    int | None, typer.Option(help="Draws per member; the default is the posterior mean.", show_default=False)
]
MemberChunk = Annotated[
    int | None, typer.Option(help="Members computed at a time, to save memory; the default is all.", show_default=False)
]
Device = Annotated[
    str | None,
    typer.Option(help="Where to compute, e.g. cpu; the default is a GPU if there is one.", show_default=False),
]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What the columns of a data set are; they are found by themselves where not given.

    Args:
        image_column: column of images.
        text_column: column of texts.
        text_pair_column: column of second texts, where inputs are pairs.
        label_column: column of classes.
        subset: configuration of a Hub data set, e.g. mrpc of GLUE.
    """

    image_column: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    subset: str | None = None

    def load(self, dataset: str, split: str | None = None) -> Splits:
        from bayesify.data import load_data

        return load_data(dataset, split=split, **dataclasses.asdict(self))


def with_options(**panels: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each field of its dataclass parameters.

    Type, default and help of an option are the field's (its text in the class's docstring), so the command line
    cannot say anything else than Python does. The command gets the object. A parameter `recipe` of the command names
    the options that stand where none is typed.

    Args:
        panels: {parameter: heading of its options in the help}.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, Any] = {name: hints[name] for name in panels}
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(function).parameters.values():
            name = parameter.name
            if name in groups:
                parameters += _options(groups[name], panels[name])
            else:
                parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

        @functools.wraps(function)
        def command(**values: Any) -> None:
            recipe = values.get("recipe")
            typed: dict[str, Any] = {}
            for name, cls in groups.items():
                fields = dataclasses.fields(cls)
                own = {field.name: _value(field, values.pop(field.name)) for field in fields}
                if recipe is None:
                    values[name] = cls(**own)
                else:
                    typed |= {field: value for field, value in own.items() if given(values["ctx"], field)}
            if recipe is not None:
                values |= _from_recipe(recipe, typed, groups)
            function(**values)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _from_recipe(name: str, typed: dict[str, Any], groups: dict[str, Any]) -> dict[str, Any]:
    """The objects of a recipe, with the typed options in it, and of the other groups."""
    from bayesify.recipes import recipe

    configs = {"rank1", "tuning"} & groups.keys()
    others = {group: set(field_names(cls)) for group, cls in groups.items() if group not in configs}
    elsewhere = set().union(*others.values())
    chosen = recipe(name).override(**{field: value for field, value in typed.items() if field not in elsewhere})
    rest = {group: groups[group](**{f: v for f, v in typed.items() if f in names}) for group, names in others.items()}
    return {config: getattr(chosen, config) for config in configs} | rest


def _options(cls: Any, panel: str) -> list[inspect.Parameter]:
    hints, texts = get_type_hints(cls), _texts(cls)
    parameters = []
    for field in dataclasses.fields(cls):
        kind, optional = _without_none(hints[field.name])
        default = field.default
        text = texts.get(field.name, "").replace("`None`", "0" if _zero_is_none(field) else "leaving it out")
        text = text.replace("`", "")
        details: dict[str, Any] = {"help": text, "rich_help_panel": panel}
        if get_origin(kind) is Literal:
            details["metavar"] = "|".join(get_args(kind))
            kind = str
        elif get_origin(kind) is tuple:
            item = get_args(kind)[0]
            kind, default = list[float if item is float else str], list(default)  # type: ignore[arg-type]
        elif optional:
            kind = kind | None
        flag = flag_of(field.name)
        if kind is bool:
            flag = f"{flag}/--no-{flag[2:]}"
        annotation = Annotated[kind, typer.Option(flag, **details)]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return parameters


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) not in (types.UnionType, Union):
        return hint, False
    (kind,) = [part for part in get_args(hint) if part is not type(None)]
    return kind, True


def _value(field: dataclasses.Field[Any], value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return None if value == 0 and _zero_is_none(field) else value


def _zero_is_none(field: dataclasses.Field[Any]) -> bool:
    """Whether 0, which would have no meaning, stands for None on the command line."""
    kind = str(field.type)
    return "None" in kind and ("int" in kind or field.default is not None)


def _texts(cls: Any) -> dict[str, str]:
    """What the Args section of a docstring says of each name."""
    texts: dict[str, str] = {}
    section = inspect.getdoc(cls) or ""
    section = section.partition("Args:\n")[2].partition("\n\n")[0]
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
        text = " ".join(text.split())
        texts |= {name.strip(): text[:1].upper() + text[1:] for name in names.split(",")}
    return texts


def flag_of(name: str) -> str:
    return FLAGS.get(name, "--" + name.replace("_", "-"))


def given(ctx: typer.Context, *names: str) -> list[str]:
    """Those of the options that were typed."""
    sources = {name: ctx.get_parameter_source(name) for name in names}
    return [flag_of(name) for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def refuse(ctx: typer.Context, names: Sequence[str], why: str) -> None:
    """Raise `ConfigError` if one of the options was typed."""
    if typed := given(ctx, *names):
        raise ConfigError(f"{', '.join(typed)}: {why}")


def field_names(*classes: Any) -> list[str]:
    return [field.name for cls in classes for field in dataclasses.fields(cls)]


def say(text: str, *, err: bool = False) -> None:
    typer.echo(text, err=err)


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


def load_with_inputs(model: str, trust_remote_code: bool) -> tuple[nn.Module, Preprocessing, list[str]]:
    """A Bayesian or base model in eval mode, its preprocessing and its class names."""
    from bayesify.hub import load_model
    from bayesify.model import BayesianModel

    network, base = load_model(model, trust_remote_code=trust_remote_code)
    if not isinstance(network, BayesianModel):
        preprocessing = inputs_of(network, base, kind_of(network), trust_remote_code=trust_remote_code)
        return network.eval(), preprocessing, list(base.label_names)
    if network.preprocessing is None:
        raise FormatError(
            f"{model} does not say how its inputs are made (preprocessing); set .preprocessing in Python and save it."
        )
    return network, network.preprocessing, network.label_names


def load_baseline(baseline: str, model: str, classes: Sequence[str], trust_remote_code: bool) -> nn.Module:
    """A network to compare `model` with. Raises `ConfigError` if its classes are not the same in the same order."""
    network, _, names = load_with_inputs(baseline, trust_remote_code)
    if len(names) != len(classes) or (names != list(classes) and not unnamed(names)):
        raise ConfigError(f"{baseline} and {model} have different classes, or the same in another order.")
    return network


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
