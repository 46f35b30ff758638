"""Options that the subcommands share: single ones, and those made from config classes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from bayesify.errors import ConfigError

if TYPE_CHECKING:
    from bayesify.data import Splits

FLAGS = {"trackers": "--tracker"}
"""Options whose name is not that of the field."""

Model = Annotated[str, typer.Argument(help="A timm name, a Hub id or a folder.", show_default=False)]
Dataset = Annotated[
    str, typer.Argument(help="A Hub id, a folder of images, or Parquet, CSV or JSON files.", show_default=False)
]
AnyModel = Annotated[
    str, typer.Argument(help="A saved Bayesian model (folder or Hub id), or any base model.", show_default=False)
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
Split = Annotated[str, typer.Option(help="Split to evaluate on, or a part of it: test[:200].")]
Baseline = Annotated[
    str | None, typer.Option(help="Another model to list beside, on the same inputs.", show_default=False)
]
Samples = Annotated[
    int | None, typer.Option(help="Draws per member; the default is the posterior mean.", show_default=False)
]
MemberChunk = Annotated[
    int | None,
    typer.Option(help="Members computed at a time; the default is what is expected to cost least.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", show_default=False)]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples of one forward pass.")]
DrawSeed = Annotated[int, typer.Option(help="Of the draws.")]
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

    def load(self, dataset: str, split: str | None = None, labels: bool = True) -> Splits:
        from bayesify.data import load_data

        return load_data(dataset, split=split, labels=labels, **dataclasses.asdict(self))


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
            options = {
                group: {name: _value(cls, name, values.pop(name)) for name in field_names(cls)}
                for group, cls in groups.items()
            }
            if (recipe := values.get("recipe")) is not None:
                values |= _from_recipe(recipe, values["ctx"], options.pop("rank1") | options.pop("tuning"))
            values |= {name: groups[name](**own) for name, own in options.items()}
            function(**values)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _from_recipe(name: str, ctx: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """The configs of a recipe, with those of the options in them that were typed."""
    from bayesify.recipes import recipe

    chosen = recipe(name).override(**{field: value for field, value in options.items() if given(ctx, field)})
    return {"rank1": chosen.rank1, "tuning": chosen.tuning}


def _options(cls: Any, panel: str) -> list[inspect.Parameter]:
    hints, texts = get_type_hints(cls), _texts(cls)
    parameters = []
    for field in dataclasses.fields(cls):
        kind, optional = _without_none(hints[field.name])
        default = field.default
        text = texts.get(field.name, "").replace("`None`", "0" if field.name in _zeros(cls) else "leaving it out")
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


def _value(cls: Any, name: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return None if value == 0 and name in _zeros(cls) else value


@functools.cache
def _zeros(cls: Any) -> set[str]:
    """Options of which 0, which would have no meaning, stands on the command line for the None of their text."""
    texts = _texts(cls)
    named = [field for field in dataclasses.fields(cls) if "`None`" in texts.get(field.name, "")]
    optional = [field for field in named if "None" in str(field.type)]
    return {field.name for field in optional if "int" in str(field.type) or field.default is not None}


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
