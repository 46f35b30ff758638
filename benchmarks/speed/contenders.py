"""Who is timed: K deterministic forwards, bayesify in its modes, and what others offer for the same purpose."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify import bayesify
from bayesify.layers import speed_up
from benchmarks.rows import reason
from benchmarks.speed.networks import Network

Call = Callable[[], object]
Contender = Callable[[Network, nn.Module, Any, int], Call]
"""(network, base model, inputs of B examples, K) -> what is timed. The base model is not to be changed."""


# ------------------------------------------------------------------------------------------------ inference


def floor(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
    """K deterministic forwards of one network."""
    return _no_grad(lambda: [network.call(base, inputs) for _ in range(members)])


def floor_at_once(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
    """One deterministic forward of all K·B rows."""
    repeated = _repeat(inputs, members)
    return _no_grad(lambda: network.call(base, repeated))


def floor_folded(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
    """K deterministic forwards of a network whose batch norms are folded into its convolutions."""
    folded = _folded(base)
    return _no_grad(lambda: [network.call(folded, inputs) for _ in range(members)])


def floor_faster(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
    """K deterministic forwards of a network with the layers of a fused one: oneDNN's products, weights packed once, and
    convolutions of 1 x 1 as products."""
    faster = copy.deepcopy(base)
    if not speed_up(faster):
        raise ValueError("none of its layers has a faster one")
    return _no_grad(lambda: [network.call(faster, inputs) for _ in range(members)])


def _folded(base: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    if not any(isinstance(module, nn.BatchNorm2d) for module in base.modules()):
        raise ValueError("there are no batch norms")
    return fuse(base)


def floor_compiled(folded: bool) -> Contender:
    """K deterministic forwards of one compiled network."""

    def contender(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
        model: Any = torch.compile(_folded(base) if folded else copy.deepcopy(base))
        return _no_grad(lambda: [network.call(model, inputs) for _ in range(members)])

    return contender


def deep_ensemble(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
    """K plain copies, one after the other."""
    copies = [copy.deepcopy(base) for _ in range(members)]
    return _no_grad(lambda: torch.stack([network.call(model, inputs) for model in copies]).mean(0))


def vmap(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
    """K copies with stacked weights under `torch.func.vmap`."""
    stacked = torch.func.stack_module_state([copy.deepcopy(base) for _ in range(members)])
    skeleton = copy.deepcopy(base).to("meta")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = skeleton

        def forward(self, inputs: Any) -> Tensor:
            return network.call(self.model, inputs)

    wrapper = Logits().train(base.training)
    parameters, buffers = ({f"model.{name}": value for name, value in state.items()} for state in stacked)

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(wrapper, (parameters, buffers), (inputs,))

    return _no_grad(lambda: torch.vmap(one, randomness="different")(parameters, buffers))


def ours(member_chunk: int | None = None) -> Contender:
    """The posterior mean of K members, all of them or fewer computed at once."""

    def contender(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
        bnn = bayesify(copy.deepcopy(base), members=members, task="classification").eval()
        predict = partial(bnn.predict, member_chunk=member_chunk)
        return lambda: predict(**inputs) if isinstance(inputs, dict) else predict(inputs)

    return contender


def ours_compiled(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
    """The posterior mean of K members with the network compiled."""
    bnn = bayesify(copy.deepcopy(base), members=members, task="classification").eval()
    bnn.compile()
    return _no_grad(lambda: network.call(bnn, inputs))


def fused(compile: bool) -> Contender:
    """The posterior mean of K members with their factors folded."""

    def contender(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
        bnn = bayesify(copy.deepcopy(base), members=members, task="classification").eval()
        module = bnn.fuse(example_inputs=inputs)
        for one in module.networks if compile else ():
            one.compile()
        return _no_grad(lambda: network.call(module, inputs))

    return contender


# ------------------------------------------------------------------------------------------------ parting late


def late(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
    """The posterior mean of K members that differ from the last stage on."""
    bnn = bayesify(copy.deepcopy(base), members=members, include=network.late, task="classification").eval()
    return lambda: bnn.predict(inputs)


class _TrunkEndsError(Exception):
    """With what the last stage gets."""


def _end(_: nn.Module, args: Any) -> None:
    raise _TrunkEndsError(args[0])


def trunk_and_tails(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
    """What comes before the last stage once, and the rest K times."""
    stage, seen = base.get_submodule(network.late[0]), []
    with torch.no_grad(), stage.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        whole = network.call(base, inputs)
    if network.tail is None or not torch.allclose(network.tail(base, seen[0]), whole, atol=1e-5):
        raise ValueError("the tail does not give what the network gives")
    tail = network.tail

    def call() -> object:
        with stage.register_forward_pre_hook(_end):
            try:
                network.call(base, inputs)
            except _TrunkEndsError as end:
                (x,) = end.args
        return [tail(base, x) for _ in range(members)]

    return _no_grad(call)


def bayesian_torch(kind: str) -> Contender:
    """K samples of a mean-field network."""

    def contender(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
        model = _mean_field(copy.deepcopy(base), kind)
        return _no_grad(lambda: torch.stack([network.call(model, inputs) for _ in range(members)]).mean(0))

    return contender


def torch_uncertainty(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
    """BatchEnsemble layers: deterministic factors."""
    from torch_uncertainty.methods import batch_ensemble  # type: ignore[import-not-found]

    model = batch_ensemble(copy.deepcopy(base), num_estimators=members, convert_layers=True)
    model.eval()  # or it repeats nothing
    return _no_grad(lambda: network.call(model, inputs))


INFERENCE: dict[str, Contender] = {
    "floor": floor,
    "floor, K·B rows": floor_at_once,
    "floor, norms folded": floor_folded,
    "floor, faster layers": floor_faster,
    "bayesify": ours(),
    "bayesify, one member at a time": ours(member_chunk=1),
    "bayesify, fused": fused(compile=False),
    "deep ensemble": deep_ensemble,
    "vmap": vmap,
    "bayesian-torch reparameterization": bayesian_torch("Reparameterization"),
    "bayesian-torch flipout": bayesian_torch("Flipout"),
    "torch-uncertainty BatchEnsemble": torch_uncertainty,
}

COMPILED: dict[str, Contender] = {
    "floor, compiled": floor_compiled(folded=False),
    "floor": floor,
    "floor, norms folded, compiled": floor_compiled(folded=True),
    "bayesify, compiled": ours_compiled,
    "bayesify, fused, compiled": fused(compile=True),
}
LATE: dict[str, Contender] = {
    "floor": floor,
    "trunk once, K tails": trunk_and_tails,
    "bayesify": late,
    "deep ensemble": deep_ensemble,
}


# ------------------------------------------------------------------------------------------------ training


def _step(network: Network, model: nn.Module, inputs: Any, labels: Tensor, kl: Callable[[], Any] | None = None) -> Call:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(network.call(model, inputs).flatten(0, -2), labels.flatten())
        if kl is not None:
            loss = loss + kl() / 50_000
        loss.backward()
        optimizer.step()

    return step


def _labels(network: Network, base: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        return torch.randint(network.classes, network.call(base, inputs).shape[:-1])


def deterministic_step(rows: int) -> Contender:
    """A training step of the plain network on `rows` times the batch (0: K times)."""

    def contender(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
        model, times = copy.deepcopy(base).train(), rows or members
        repeated = _repeat(inputs, times)
        return _step(network, model, repeated, _labels(network, base, repeated))

    return contender


def our_step(train: str, expansion: str = "replicate") -> Contender:
    """A training step with the KL, on B examples."""

    def contender(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
        bnn = bayesify(copy.deepcopy(base), members=members, task="classification").train()
        bnn.expansion = expansion  # type: ignore[assignment]
        if train == "factors":
            for _, parameter in bnn.slow_parameters():
                parameter.requires_grad_(False)
        labels = _labels(network, base, inputs)
        if expansion == "replicate":
            labels = labels.repeat(members, *[1] * (labels.dim() - 1))
        return _step(network, bnn, inputs, labels, bnn.kl)

    return contender


def bayesian_torch_step(kind: str) -> Contender:
    """A training step of a mean-field network on K·B rows, with its KL."""

    def contender(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
        from bayesian_torch.models.dnn_to_bnn import get_kl_loss  # type: ignore[import-not-found]

        model = _mean_field(copy.deepcopy(base).train(), kind)
        repeated = _repeat(inputs, members)
        return _step(network, model, repeated, _labels(network, base, repeated), lambda: get_kl_loss(model))

    return contender


PARTITION, PLAIN_STEP = "bayesify, partition", "deterministic, B rows"

TRAINING: dict[str, Contender] = {
    "deterministic, K·B rows": deterministic_step(0),
    PLAIN_STEP: deterministic_step(1),
    "bayesify, all weights": our_step("all"),
    "bayesify, factors only": our_step("factors"),
    PARTITION: our_step("all", "partition"),
    "bayesian-torch reparameterization": bayesian_torch_step("Reparameterization"),
    "bayesian-torch flipout": bayesian_torch_step("Flipout"),
}


def baseline_of(contender: str, baseline: str) -> str:
    """Whom a contender is measured by: a partitioned batch by a plain step on as many rows."""
    return PLAIN_STEP if contender == PARTITION else baseline


# ------------------------------------------------------------------------------------------------ a step of decoding


def _prefilled(base: nn.Module, inputs: Any, rows: int) -> tuple[Any, dict[str, Tensor]]:
    """The cache of a prompt, for as many rows, and the next token of each example."""
    with torch.no_grad():
        cache = base(input_ids=inputs["input_ids"].repeat(rows, 1), use_cache=True).past_key_values
    return cache, {"input_ids": inputs["input_ids"][:, -1:]}


def decode_floor(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
    """One deterministic step."""
    return _decode(base, inputs, 1, base)


def decode_ensemble(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
    """A step of K plain copies."""
    steps = [_decode(copy.deepcopy(base), inputs, 1, base) for _ in range(members)]
    return lambda: [step() for step in steps]


def decode_ours(network: Network, base: nn.Module, inputs: Any, members: int) -> Call:
    """A step of K members, from the average of their probabilities."""
    bnn = bayesify(copy.deepcopy(base), members=members).eval()
    return _decode(bnn, inputs, members, base)


def _decode(model: nn.Module, inputs: Any, rows: int, base: nn.Module) -> Call:
    cache, token = _prefilled(base, inputs, rows)

    def step() -> None:
        model(**token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return _no_grad(step)


DECODING: dict[str, Contender] = {
    "floor": decode_floor,
    "bayesify": decode_ours,
    "deep ensemble": decode_ensemble,
}


# ------------------------------------------------------------------------------------------------ helpers


def ready(
    contenders: dict[str, Contender], network: Network, batch: int, members: int
) -> tuple[dict[str, Call], dict[str, str]]:
    """What can be timed, and why the others cannot."""
    torch.manual_seed(0)
    base, inputs = network.build().eval(), network.inputs(batch)
    calls: dict[str, Call] = {}
    failed: dict[str, str] = {}
    for name, contender in contenders.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call = contender(network, base, inputs, members)
                call()
            calls[name] = call
        except Exception as error:  # whatever another library raises is its answer
            failed[name] = reason(error)
    return calls, failed


def _mean_field(model: nn.Module, kind: str) -> nn.Module:
    """A network converted by bayesian-torch, in place."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn  # type: ignore[import-not-found]

    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.0}
    dnn_to_bnn(model, {**settings, "type": kind, "moped_enable": False, "moped_delta": 0.5})
    return model


def _no_grad(call: Call) -> Call:
    def without() -> object:
        with torch.no_grad():
            return call()

    return without


def _repeat(inputs: Any, times: int) -> Any:
    if isinstance(inputs, dict):
        return {name: _repeat(value, times) for name, value in inputs.items()}
    return inputs.repeat(times, *[1] * (inputs.dim() - 1))
