"""What other libraries that turn a network into a Bayesian one make of the same networks.

One network of each family of timm, the same random weights and images. Each row says whether the library's own
converter takes the network, which share of the parameters in linear maps it makes random, whether the result runs and
gives outputs of the right shape, and, with all variance taken out, whether these are the network's.

* bayesian-torch: `dnn_to_bnn` makes linear and convolutional layers mean-field Gaussian, started at the weights.
* torchbayesian: `BayesianModule` replaces every parameter by a Gaussian, started at the weights.
* torch-uncertainty: `batch_ensemble(convert_layers=True)` is its only converter of weights. It starts them anew, so its
  identity can't hold; wrappers that need dropout or training runs are no converters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.coverage import timm_models
from benchmarks.coverage.account import Account
from benchmarks.coverage.checks import IDENTITY_TOLERANCE
from benchmarks.coverage.jobs import FailedStepError, Job, Row, step
from benchmarks.coverage.operands import linear_parameters
from benchmarks.coverage.original import MEMBERS, real_tensors, relative_error, revive


@dataclass(frozen=True)
class Rival:
    """A library's converter.

    Attributes:
        convert: network -> a module that is called like it.
        random: module -> names, in the original network, of the parameters that are random now.
        silence: takes all variance out, in place.
    """

    convert: Callable[[nn.Module], nn.Module]
    random: Callable[[nn.Module], set[str]]
    silence: Callable[[nn.Module], None]


# ------------------------------------------------------------------------------------------------ ours


def _bayesify(model: nn.Module) -> nn.Module:
    from bayesify import bayesify

    return bayesify(model, members=MEMBERS, task="regression")


def _bayesify_random(model: nn.Module) -> set[str]:
    layers = dict(model.layers())  # type: ignore[operator]
    return {f"{name}.{own}" for name, layer in layers.items() for own, _ in layer.named_parameters()}


@torch.no_grad()
def _bayesify_silence(model: nn.Module) -> None:
    for _, _, factor in model.factors():  # type: ignore[operator]
        factor.loc.fill_(1.0)


# ------------------------------------------------------------------------------------------------ bayesian-torch


def _bayesian_torch(model: nn.Module) -> nn.Module:
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn  # type: ignore[import-not-found]

    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.0}
    dnn_to_bnn(model, {**settings, "type": "Reparameterization", "moped_enable": True, "moped_delta": 0.5})
    return model


def _bayesian_torch_random(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if getattr(module, "dnn_to_bnn_flag", False)}


@torch.no_grad()
def _silence_rho(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2].startswith("rho"):
            parameter.fill_(-1e4)  # softplus of it is 0


# ------------------------------------------------------------------------------------------------ torchbayesian


def _torchbayesian(model: nn.Module) -> nn.Module:
    from torchbayesian.bnn import BayesianModule  # type: ignore[import-not-found]

    return BayesianModule(model, variational_posterior="PRETRAINED_NORMAL")


def _torchbayesian_random(model: nn.Module) -> set[str]:
    found = set()
    for name, module in model.module.named_modules():  # type: ignore[union-attr]
        for weight in getattr(module, "reparametrizations", {}):
            found.add(f"{name}.{weight}" if name else weight)
    return found


# ------------------------------------------------------------------------------------------------ torch-uncertainty


def _torch_uncertainty(model: nn.Module) -> nn.Module:
    from torch_uncertainty.methods import batch_ensemble  # type: ignore[import-not-found]

    return batch_ensemble(model, num_estimators=MEMBERS, convert_layers=True)


def _torch_uncertainty_random(model: nn.Module) -> set[str]:
    core: nn.Module = model.core_model  # type: ignore[assignment]
    return {f"{name}.weight" for name, module in core.named_modules() if hasattr(module, "r_group")}


@torch.no_grad()
def _torch_uncertainty_silence(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(("r_group", "s_group")):
            parameter.fill_(1.0)


RIVALS = {
    "bayesify": Rival(_bayesify, _bayesify_random, _bayesify_silence),
    "bayesian-torch": Rival(_bayesian_torch, _bayesian_torch_random, _silence_rho),
    "torchbayesian": Rival(_torchbayesian, _torchbayesian_random, _silence_rho),
    "torch-uncertainty": Rival(_torch_uncertainty, _torch_uncertainty_random, _torch_uncertainty_silence),
}


# ------------------------------------------------------------------------------------------------ the suite


def plan(rows: list[Row], only: str, fast: bool) -> list[Job]:
    """The smallest network of each family, for each library."""
    chosen, census = timm_models.chosen_after_census("rivals", rows, only, fast, further=False)
    return census + [Job("rivals", rival, name, timm_models.family(name)) for name in chosen for rival in RIVALS]


def measure(job: Job) -> Row:
    if job.stage == "census":
        return timm_models.measure(job)
    return compare(RIVALS[job.stage], job.name)


def compare(rival: Rival, name: str) -> Row:
    """Convert, run with noise, and run without."""
    row: Row = {"status": "ok"}
    try:
        with step("build"):
            model, (args, kwargs) = timm_models.build(name)
            revive(model.eval())
            account = Account(model)
        with step("base"):
            output, linear = linear_parameters(model, args, kwargs)
            expected = real_tensors(output)
        with step("convert"):
            torch.manual_seed(0)
            converted = rival.convert(model).eval()
            row |= account.share(linear, rival.random(converted))
        with step("probe"), torch.no_grad():
            _check_shapes(expected, real_tensors(converted(*args, **kwargs)))
        with step("identity"), torch.no_grad():
            rival.silence(converted)
            row["identity"] = _error(expected, real_tensors(converted(*args, **kwargs)))
            if not row["identity"] <= IDENTITY_TOLERANCE:
                raise FailedStepError("identity", f"without variance the outputs differ by {row['identity']:.2g}")
    except FailedStepError as failure:
        row |= {"status": failure.status, "error": str(failure)}
    return row


def _check_shapes(expected: list[Tensor], found: list[Tensor]) -> None:
    """The shapes of the original, or the same for every member."""
    shapes = [tuple(o.shape) for o in expected], [tuple(o.shape) for o in found]
    each = [(MEMBERS * shape[0], *shape[1:]) for shape in shapes[0]]
    if shapes[1] not in (shapes[0], each):
        raise FailedStepError("probe", f"outputs of {shapes[1]} where the original has {shapes[0]}")


def _error(expected: list[Tensor], found: list[Tensor]) -> float:
    pairs = zip(expected, found, strict=True)
    return max(relative_error(part, e) for e, f in pairs for part in f.split(e.shape[0]))
