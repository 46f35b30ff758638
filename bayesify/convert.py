"""`bayesify(model)`: the conversion from end to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayesify.config import Rank1Config
from bayesify.errors import ConfigError, ConversionError
from bayesify.graph import ConversionReport, Plan, as_inputs, audit, find_sites, report_on, swap
from bayesify.layers import Rank1Layer
from bayesify.model import BayesianModel
from bayesify.tasks import TASKS, TaskName


def bayesify(
    model: nn.Module,
    config: Rank1Config | None = None,
    *,
    task: TaskName | None = None,
    example_inputs: Any = None,
    **options: Any,
) -> BayesianModel:
    """Turn a pretrained network into a rank-1 Bayesian one, in place and without copying its weights.

    Every weight matrix W becomes W ∘ (r sᵀ) with random r and s (Dusenberry et al. 2020, Fig. 1).

    Args:
        model: any `nn.Module`.
        config: the options; or give them as keywords: ``bayesify(model, members=4, noise="member")``.
        task: how outputs are read, see `BayesianModel.task`; by default from the model's config or its output.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments. With them the result is
            checked: at factors of 1 each member must reproduce the network, every site must be reached, and no
            example may see another's factors.

    Raises:
        ConversionError: nothing to convert, a pattern without a match, or a failed check. The model is unchanged.
        ConfigError: an unknown option or task.
    """
    if task is not None and task not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}; found {task!r}.")
    if not isinstance(model, nn.Module):
        raise ConversionError(f"expected a torch.nn.Module; found {type(model).__name__}.")
    config = _config(config, options)
    _check_plain(model)
    inputs = None if example_inputs is None else as_inputs(example_inputs)
    plan = find_sites(model, config, inputs)
    if inputs is not None:
        audit(model, inputs, plan, config)
    return _swapped(model, plan, config, task)


def rebuild(
    model: nn.Module, config: Rank1Config, sites: Mapping[str, int], *, task: TaskName | None = None
) -> BayesianModel:
    """Convert as it was done before: the given sites and no others, with the batch in the given dimensions.

    Raises:
        ConversionError: one of the sites cannot be converted in this model, which is unchanged.
    """
    _check_plain(model)
    plan = find_sites(model, config)
    plan.restrict(sites)
    return _swapped(model, plan, config, task)


def _swapped(model: nn.Module, plan: Plan, config: Rank1Config, task: TaskName | None) -> BayesianModel:
    report = report_on(model, plan, config)
    swap(plan, config)
    bnn = BayesianModel(model, config, report, task)
    bnn.training = model.training  # not train(): parts of a model may be in modes of their own
    return bnn


def inspect(
    model: nn.Module, config: Rank1Config | None = None, *, example_inputs: Any = None, **options: Any
) -> ConversionReport:
    """What `bayesify` would convert, skip and add, without changing anything."""
    config = _config(config, options)
    _check_plain(model)
    inputs = None if example_inputs is None else as_inputs(example_inputs)
    return report_on(model, find_sites(model, config, inputs), config)


def _config(config: Rank1Config | None, options: dict[str, Any]) -> Rank1Config:
    if config is not None and options:
        raise ConfigError(f"give a Rank1Config or keywords, not both; found {', '.join(options)} beside the config.")
    if config is not None and not isinstance(config, Rank1Config):
        raise ConfigError(f"config must be a Rank1Config; found {type(config).__name__}. Options go by name.")
    try:
        return config or Rank1Config(**options)
    except TypeError as error:
        raise ConfigError(f"{error}. Options are the fields of Rank1Config.") from error


def _check_plain(model: nn.Module) -> None:
    if isinstance(model, BayesianModel) or any(isinstance(module, Rank1Layer) for module in model.modules()):
        raise ConversionError("this model is already Bayesian; call .unload() first to convert it anew.")
