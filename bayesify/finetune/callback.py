"""Training with transformers' own Trainer, or one made from it: the KL joins the network's loss."""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bayesify.errors import ConfigError
from bayesify.finetune.config import FineTuneConfig
from bayesify.model import BayesianModel
from bayesify.objective import ELBO


class KLCallback(TrainerCallback):
    """Makes transformers' Trainer minimize NLL + T · κ(t) · KL / (N · V), as `ELBO` does (paper Eq. 2).

    ```python
    optimizer = make_optimizer(bnn, FineTuneConfig(learning_rate=2e-5))
    trainer = Trainer(bnn, arguments, train_dataset=data, callbacks=[KLCallback()], optimizers=(optimizer, None))
    ```

    The optimizer is worth giving: the Trainer's own has one learning rate, and factors want a larger one. The history
    of logs gains "kl", in nats; other reports get it where the callback comes before theirs, in
    `trainer.callback_handler.callbacks`. With gradient accumulation, losses are averaged over the accumulated batches.
    Labels that are not called so (start_positions, say) have to be named in `TrainingArguments(label_names=...)`, or
    there is no eval_loss.

    Args:
        num_examples: N; by default the length of the training data.
        annealing: the share of all steps over which κ rises linearly to 1.
        temperature: T.

    Raises:
        ConfigError: the model is not Bayesian, N is not known, several GPUs in one process, or an optimizer that pulls
            factors to zero by weight decay.
    """

    def __init__(
        self,
        num_examples: int | None = None,
        annealing: float = FineTuneConfig.kl_annealing,
        temperature: float = FineTuneConfig.kl_temperature,
    ) -> None:
        self.num_examples = num_examples
        self.annealing = annealing
        self.temperature = temperature
        self.elbo: ELBO | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        bnn = _bayesian(model)
        _show_signature(bnn)
        bnn.register_state_dict_post_hook(_untie)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        bnn = _bayesian(model)
        if args.n_gpu > 1:
            raise ConfigError("several GPUs in one process share no factors; start one process a GPU, with torchrun.")
        _check_decay(bnn, optimizer)
        examples = self.num_examples
        if examples is None:
            try:
                examples = len(train_dataloader.dataset)
            except (AttributeError, TypeError) as error:
                raise ConfigError("the training data have no length; give KLCallback(num_examples=...).") from error
        steps = round(self.annealing * state.max_steps)
        self.elbo = ELBO(bnn, examples, annealing_steps=steps, kl_temperature=self.temperature)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.elbo is not None:
            self.elbo.model.kl_weight = self.elbo.weight(state.global_step) / self.elbo.num_examples

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.elbo is not None and logs is not None and "loss" in logs:
            with torch.no_grad(), torch.random.fork_rng():
                logs["kl"] = self.elbo.model.kl().item()
            state.log_history[-1]["kl"] = logs["kl"]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.elbo is not None:
            self.elbo.model.kl_weight = 0.0
            self.elbo = None


def _bayesian(model: Any) -> BayesianModel:
    """The Bayesian model in what a trainer wraps it in."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, BayesianModel):
            return module
    raise ConfigError(f"KLCallback is for a model converted by bayesify; found {type(model).__name__}.")


def _show_signature(bnn: BayesianModel) -> None:
    """Let `forward` have the network's own signature: trainers drop the columns of the data that it does not name."""
    forward = type(bnn).forward

    @functools.wraps(forward)
    def shown(self: BayesianModel, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    shown.__signature__ = inspect.signature(type(bnn.model).forward)  # type: ignore[attr-defined]
    bnn.forward = MethodType(shown, bnn)


def _untie(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Copy tied weights in a state dict: trainers write it to safetensors, which holds no tensor twice."""
    seen: set[tuple[torch.device, int]] = set()
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.numel():
            place = (tensor.device, tensor.untyped_storage().data_ptr())
            if place in seen:
                state[name] = tensor.clone()
            seen.add(place)


def _check_decay(bnn: BayesianModel, optimizer: Any) -> None:
    factors = {id(p) for _, _, factor in bnn.factors() for p in factor.parameters()}
    for group in getattr(optimizer, "param_groups", ()):
        if group.get("weight_decay") and any(id(p) in factors for p in group["params"]):
            raise ConfigError(
                "weight decay would pull the factors to zero, and the network with them. Give the Trainer "
                "optimizers=(make_optimizer(bnn, FineTuneConfig(...)), None) of bayesify.finetune, or no weight decay."
            )
