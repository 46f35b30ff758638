"""`FusedModel`: a Bayesian model made for inference alone, with fixed draws merged with what is beside them."""

from __future__ import annotations

import copy
import functools
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bayesify.batch import Rows
from bayesify.errors import ConfigError, ConversionError, DataError, TrainingError
from bayesify.graph import NormPairs, as_inputs, derive_inputs, norm_pairs
from bayesify.graph.inputs import Inputs
from bayesify.layers import Gathering, MemberBatchNorm, Rank1Layer, detach, speed_up
from bayesify.merge import absorb_norm, fold, give_scale, single
from bayesify.modes import full_float32
from bayesify.predictive import Predictive
from bayesify.tasks import TaskName, resolve_task

if TYPE_CHECKING:
    from bayesify.model import BayesianModel

Weights = Literal["copies", "shared"]
_CACHES = ("use_cache", "use_mems_eval")
"""Options of transformers' networks to return what the next call is to be given."""
_TOLERANCE = 1e-4
"""Relative, of a network with merged batch norms on example inputs."""


class FusedModel(nn.Module):
    """K·S networks without random numbers, for inference. Made by `BayesianModel.fuse`.

    A call takes what the network takes and gives B rows, the predictive in the network's own output type, as a
    `BayesianModel` does in eval mode; it keeps no caches of keys and values. `predict(...)` gives a `Predictive`. It
    can be given to `torch.export.export` and, with ``dynamo=True``, to `torch.onnx.export`.

    Attributes:
        networks: the network of each member and sample, member k's sample s at k·S + s. They share all parameters but
            those that factors or batch norms are folded into.
        members, samples: K and S.
        weights: "copies", where each network has folded weights of its own, or "shared", where all use the one W, and
            what was merged lies in the vectors around it.
        norms: names of the batch norms that became a part of the layer before them.
        task, temperature: how outputs are read, see `BayesianModel`.
        settings: the options of `fuse` that were given.
        source: the Bayesian model as it was when fused; what `save_pretrained` writes. It is no submodule.
    """

    source: BayesianModel

    def __init__(
        self,
        networks: list[nn.Module],
        source: BayesianModel,
        weights: Weights,
        norms: list[str],
        settings: dict[str, Any],
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.__dict__["source"] = source
        self.members = source.members
        self.samples = len(networks) // source.members
        self.weights: Weights = weights
        self.norms = norms
        self.task: TaskName | None = source.task
        self.settings = settings
        self.temperature = source.temperature
        # The network's own arguments by name: exporters look for them.
        call: Any = functools.partial(self._called)
        call.__signature__ = inspect.signature(networks[0].forward)
        self.forward = call
        self.requires_grad_(False)
        self.eval()

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        rows = Rows(self.networks[0])
        batch = rows.batch_size(args, kwargs)
        output = rows.joined([network(*args, **kwargs) for network in self._for(kwargs)], batch)
        return rows.reduce(output, len(self.networks), batch, self.task, self.temperature)

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> Predictive:
        """The predictive distribution for B examples; `labels` are ignored.

        Returns:
            `Predictive` with outputs [K, S, B, ...].
        """
        kwargs.pop("labels", None)
        rows = Rows(self.networks[0])
        found = [rows.outputs(n(*args, **kwargs)).movedim(rows.input_dim, 0) for n in self._for(kwargs)]
        outputs = torch.stack(found).unflatten(0, (self.members, self.samples))
        task = resolve_task(outputs[0, 0], self.task)
        return Predictive.of(outputs, task, self.temperature, self.source.conformal)

    def _for(self, kwargs: dict[str, Any]) -> nn.ModuleList:
        given = [
            name
            for name in ("past_key_values", "use_cache", "mems", "use_mems")
            if kwargs.get(name) not in (None, False)
        ]
        if given:
            raise DataError(
                f"a fused model keeps no caches; found {given[0]}. Leave it out, or call the BayesianModel, whose "
                "`generate` writes text."
            )
        return self.networks

    def train(self, mode: bool = True) -> FusedModel:
        """Eval mode alone.

        Raises:
            TrainingError: for training mode.
        """
        if mode:
            raise TrainingError(
                "a fused model cannot be trained: its factors are folded. Train the BayesianModel, and fuse it anew."
            )
        return super().train(False)

    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:
        """Write the Bayesian model and the options of `fuse`, by which `from_pretrained` fuses it again.

        See `bayesify.hub.save_pretrained`.
        """
        from bayesify.hub import save_pretrained

        return save_pretrained(self.source, folder, fused=self.settings, **options)

    def extra_repr(self) -> str:
        return f"members={self.members}, samples={self.samples}, weights={self.weights}, norms={len(self.norms)}"


def fuse(
    bnn: BayesianModel,
    samples: int | None = None,
    seed: int | None = None,
    *,
    weights: Weights | None = None,
    example_inputs: Any = None,
) -> FusedModel:
    """Make a module for inference from a Bayesian model, which is not changed; see `BayesianModel.fuse`."""
    if samples is not None and samples < 1:
        raise DataError(f"samples must be at least 1; found {samples}.")
    if weights not in (None, "copies", "shared"):
        raise ConfigError(f"weights must be 'copies', 'shared' or None; found {weights!r}.")
    if samples is not None and seed is None:
        seed = int(torch.randint(2**62, ()))
    source = copy.deepcopy(bnn).eval().requires_grad_(False)
    inputs = _settled(source, example_inputs)
    source.passes.parting.remove()
    keys: list[Any] = [None] if samples is None else [(seed, sample) for sample in range(samples)]
    settings = {"samples": samples, "seed": seed, "weights": weights}
    if weights is None:
        weights = "copies" if _copies_fit(source, len(keys)) else "shared"
    pairs = norm_pairs(source.model, checked=inputs is not None)
    try:
        networks, norms = _networks(source, keys, weights, pairs, inputs)
    except ConversionError as error:
        if settings["weights"] == "copies":
            raise ConversionError(f"{error} Or fuse it with weights='shared'.") from error
        weights = "shared"
        networks, norms = _networks(source, keys, weights, pairs, inputs)
    return FusedModel(networks, source, weights, norms, settings)


@torch.no_grad()
def _settled(source: BayesianModel, example_inputs: Any) -> Inputs | None:
    """Example inputs, given or derived, on which the model runs; all sites know by them where the batch is.

    Raises:
        ConversionError: the model does not run on those given, or there are none where they are needed.
    """
    given = example_inputs is not None
    with torch.random.fork_rng(devices=[]):
        inputs = as_inputs(example_inputs) if given else derive_inputs(source.model)
    if inputs is not None:
        try:
            source(*inputs[0], **inputs[1])
            return inputs
        except Exception as error:
            if given:
                raise ConversionError(
                    f"the model fails on example_inputs: {type(error).__name__}: {error}. Give the inputs of one call: "
                    "a tensor, a tuple of positional or a mapping of keyword arguments."
                ) from error
    if source.report.unsettled:
        raise ConversionError(
            "where the batch is in each layer is not known before the first call: call the model once on inputs, or "
            "give example_inputs=."
        )
    return None


def _copies_fit(source: BayesianModel, samples: int) -> bool:
    """Whether the folded weights of all networks take no more than half of the memory that is available.

    On a CPU, layers may hold them a second time.
    """
    weights = {id(w): w for _, layer in source.layers() for w in map(layer.weight_of, layer.rank1)}
    needed = source.members * samples * sum(w.numel() * w.element_size() for w in weights.values())
    device = next((w.device for w in weights.values()), torch.device("cpu"))
    if device.type == "cuda":
        return needed <= torch.cuda.mem_get_info(device)[0] / 2
    return 2 * needed <= psutil.virtual_memory().available / 2


def _networks(
    source: BayesianModel, keys: list[Any], weights: Weights, pairs: NormPairs, inputs: Inputs | None
) -> tuple[list[nn.Module], list[str]]:
    """The networks in the order of `FusedModel.networks`, and the batch norms that were merged."""
    if weights == "copies":
        pairs = NormPairs(pairs.after)  # folded layers have no factors that a norm could take over
    by_sample: list[list[nn.Module]] = []
    for key in keys:
        with source.passes.draws.drawn(slice(None), 1, key):
            if not by_sample and pairs and inputs is not None:
                plain, tried = (_network(source, 0, weights, some, None) for some in (NormPairs(), pairs))
                pairs = pairs if _agree(plain, tried, inputs) else NormPairs()
            first = by_sample[0][0] if by_sample else None
            by_sample.append([])
            for member in range(source.members):
                network = _network(source, member, weights, pairs, first)
                first = network if first is None else first
                by_sample[-1].append(network)
    merged = [norm for _, norm in pairs.after if not isinstance(by_sample[0][0].get_submodule(norm), _BatchNorm)]
    return [network for of_member in zip(*by_sample, strict=True) for network in of_member], merged


def _network(
    source: BayesianModel, member: int, weights: Weights, pairs: NormPairs, first: nn.Module | None
) -> nn.Module:
    """One member's network. What has neither factors nor norms of a member's own is merged in the `first` one only."""
    network = single(source.model, member, [*source.model.parameters(), *source.model.buffers()])
    if weights == "copies":
        fold(network)
    for module in list(network.modules()):
        if isinstance(module, Gathering):
            detach(module)  # only draws of several rows need to know where a token is from
        config = getattr(module, "config", None)
        for option in _CACHES:
            if hasattr(config, option):
                setattr(config, option, False)
    for pair in pairs.before:
        give_scale(network, *pair)
    for pair in pairs.after:
        layer, norm = map(source.model.get_submodule, pair)
        if isinstance(layer, Rank1Layer):
            absorb_norm(network, *pair)
        elif not isinstance(norm, MemberBatchNorm):
            if first is None:
                absorb_norm(network, *pair)
            else:
                for name in pair:
                    network.set_submodule(name, first.get_submodule(name))
    speed_up(network)
    return network


@torch.no_grad()
@full_float32()
def _agree(plain: nn.Module, tried: nn.Module, inputs: Inputs) -> bool:
    """Whether two networks give the same outputs."""
    rows = Rows(plain)
    expected = rows.outputs(plain(*inputs[0], **inputs[1]))
    try:
        found = rows.outputs(tried(*inputs[0], **inputs[1]))
    except Exception:  # code that wants the norm itself, in whatever way
        return False
    tolerance = max(_TOLERANCE, 10 * torch.finfo(expected.dtype).eps)
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
