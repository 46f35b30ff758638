"""Where the batch is in the inputs of each layer: seen in runs on more and more rows, of shapes alone if possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bayesify.batch import Rows
from bayesify.graph.inputs import Inputs
from bayesify.graph.plan import join, site_name
from bayesify.graph.shapes import on_shapes
from bayesify.layers import OUT_BATCH_DIM, Rank1Layer, Site, rank1_class, watched_products
from bayesify.modes import evaluating

_TRANSFORMER_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
CONSTANT = "its input does not carry the batch: it is the same for every example"


def known_dims(model: nn.Module) -> dict[str, int]:
    """{site: dimension of its input that carries the batch} inside torch.nn's own attention, where it is not 0."""
    dims: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            dims[join(name, "out_proj")] = OUT_BATCH_DIM
        elif isinstance(module, _TRANSFORMER_LAYERS) and not module.self_attn.batch_first:
            dims |= {join(name, "linear1"): 1, join(name, "linear2"): 1}
    return dims


@dataclass(frozen=True)
class Observed:
    """What runs on more and more rows show.

    Attributes:
        dims: {site: dimension of its input that carries the batch}, where the answer is unambiguous.
        without: {site: why factors cannot tell the examples in its input apart}.
    """

    dims: dict[str, int]
    without: dict[str, str]


def observe(
    model: nn.Module,
    inputs: Inputs,
    layers: Iterable[str],
    functional: Mapping[str, Mapping[str, str]],
    values: bool = False,
) -> Observed | None:
    """Look where the batch is in the inputs of sites; `None` if the model cannot be run for it.

    The model runs twice on shapes alone, with two and with three times the batch: the dimension that grows is the
    batch, or whole rows of it such as windows.

    Args:
        layers: all but attention layers are looked at, which know themselves where the batch is, as recurrent layers
            do, if they get it at all.
        functional: products in the code of modules, see `Plan`.
        values: where it does not run on shapes alone, run it on the values, too: five times the work of one call.
    """
    names = [
        name
        for name in layers
        if name not in functional and not isinstance(model.get_submodule(name), nn.MultiheadAttention)
    ]
    if not names and not functional:
        return Observed({}, {})
    seen = _grown_shapes(model, inputs, names, functional, values=False)
    if seen is None and values:
        seen = _grown_shapes(model, inputs, names, functional, values=True)
    if seen is None:
        return None
    small, large = seen
    dims: dict[str, int] = {}
    without: dict[str, str] = {}
    for name, shapes in small.items():
        grown = _grown_dim(shapes, large[name])
        if name in names and isinstance(layer := model.get_submodule(name), _RECURRENT):
            if isinstance(grown, str):
                weights = [weight for weight, _ in layer.named_parameters(recurse=False) if weight.startswith("weight")]
                without |= {site_name(name, weight): grown for weight in weights}
        elif isinstance(grown, str):
            without[name] = grown
        elif grown and name in names and not _takes_any_shape(model.get_submodule(name)):
            without[name] = f"its input carries the batch in dimension {grown}, and not in the first"
        elif grown is not None:
            dims[name] = grown
    return Observed(dims, without if dims else {})  # if nothing grows at all, the inputs did not


def _grown_dim(small: list[torch.Size], large: list[torch.Size]) -> int | str | None:
    """Which dimension grows in every call; why none can; or `None`, where it is ambiguous."""
    small, large = ([shape for shape in shapes if shape.numel()] for shapes in (small, large))  # experts without tokens
    if small and small == large:
        return CONSTANT
    if small and 3 * len(small) == 2 * len(large):
        return "it is called anew for every example"
    pairs = [(a, b) for a, b in zip(small, large, strict=False) if len(a) == len(b)]
    dims = {tuple(d for d in range(len(a)) if 3 * a[d] == 2 * b[d]) for a, b in pairs}
    if len({grown for grown in dims if len(grown) == 1}) > 1:
        return "its inputs carry the batch in one dimension at one call and in another at the next"
    return only[0] if len(dims) == 1 and len(only := dims.pop()) == 1 else None


def may_be_elsewhere(layers: Mapping[str, nn.Module], functional: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether any of the layers takes inputs with the batch in another dimension than the first."""
    return bool(functional) or any(not _knows_its_batch(layer) and _takes_any_shape(layer) for layer in layers.values())


def _knows_its_batch(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.MultiheadAttention, *_RECURRENT))


def _takes_any_shape(layer: nn.Module) -> bool:
    """Dense layers take [..., channels]; others have their rows in the first dimension."""
    equivalent = type(layer) if isinstance(layer, Rank1Layer) else rank1_class(type(layer))
    return equivalent is not None and equivalent.channel_dim == -1


_Shapes = dict[str, list[torch.Size]]
"""By site, call by call: shapes of what layers give, which have the batch where their inputs do, and of what modules
multiply with parameters in code of their own."""


def _grown_shapes(
    model: nn.Module, inputs: Inputs, names: list[str], functional: Mapping[str, Mapping[str, str]], values: bool
) -> tuple[_Shapes, _Shapes] | None:
    """Shapes with two and with three times the batch."""
    try:
        grown = tuple(Rows(model).expand(*inputs, times) for times in (2, 3))
        look = nullcontext((model, grown)) if values else on_shapes(model, grown)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), look as (looked_at, pair):
            small, large = (_run(looked_at, several, names, functional) for several in pair)
    except Exception:
        return None  # control flow on values, or an operation without a rule for shapes
    return small, large


def _run(model: nn.Module, inputs: Inputs, names: list[str], functional: Mapping[str, Mapping[str, str]]) -> _Shapes:
    with evaluating(model), _noted_shapes(model, names, functional) as shapes:
        model(*inputs[0], **inputs[1])
    return shapes


@contextmanager
def watched_outputs(model: nn.Module, names: Iterable[str], note: Callable[[str, Any], None]) -> Iterator[None]:
    """Inside, `note` gets the name of a module and what it gives, of several things the first, at each of its calls."""

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            several = isinstance(output, tuple) and not isinstance(output, PackedSequence)
            note(name, output[0] if several else output)

        return hook

    with ExitStack() as undo:
        for name in names:
            undo.callback(model.get_submodule(name).register_forward_hook(watch(name)).remove)
        yield


@contextmanager
def _noted_shapes(model: nn.Module, names: list[str], functional: Mapping[str, Mapping[str, str]]) -> Iterator[_Shapes]:
    shapes: _Shapes = {name: [] for name in names}

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            shapes[name].append(output.shape)

    with ExitStack() as undo:
        undo.enter_context(watched_outputs(model, names, note))
        for name, roles in functional.items():
            recorders = {path: _Recorder(shapes.setdefault(site_name(name, path), [])) for path in roles}
            undo.enter_context(watched_products(model.get_submodule(name), recorders, roles))
        yield shapes


class _Recorder(Site):
    """Stands where a site would, and notes the shapes of what it is to perturb."""

    def __init__(self, shapes: list[torch.Size]) -> None:
        super().__init__(None, None)
        self.shapes = shapes

    def note(self, x: Tensor) -> None:
        self.shapes.append(x.shape)
