"""Options of fine-tuning, one frozen dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bayesify.errors import ConfigError
from bayesify.model import Expansion
from bayesify.objective import Likelihood

Trained = Literal["factors", "all"]
OptimizerName = Literal["adamw", "sgd"]
Precision = Literal["no", "bf16", "fp16"]

_CHOICES = {
    "train": get_args(Trained),
    "optimizer": get_args(OptimizerName),
    "expand": get_args(Expansion),
    "likelihood": get_args(Likelihood),
    "precision": get_args(Precision),
}


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """How a converted network is fine-tuned.

    Args:
        epochs: passes over the training data, unless `steps` is given.
        steps: optimizer steps in all.
        batch_size: examples of one forward pass over all processes together, so that the number of GPUs changes nothing
            else. Examples are counted before they are repeated for the members.
        accumulation: forward passes for each optimizer step.
        train: "all" trains slow weights and factors; "factors" freezes the slow weights but for a classification head
            and what `train_also` names.
        train_also: name patterns of slow weights that train with the factors (full dotted names or globs).
        norms_and_biases: with train="factors", also train norms and biases (all one-dimensional weights).
        expand: "replicate" shows every example to every member; "partition" gives each member B/K of the batch.
        likelihood: "average" of the members' log-likelihoods, or of the "mixture".
        kl_annealing: fraction of the steps over which the weight of the KL rises linearly to 1.
        optimizer: "adamw" or "sgd" (Nesterov momentum 0.9).
        learning_rate: peak learning rate of slow weights; the schedule is linear warm-up, then cosine to zero.
        factor_lr_multiplier: the factors' learning rate is this many times larger.
        weight_decay: of slow matrices and kernels; never of factors, norms or biases.
        warmup: fraction of the steps with rising learning rate.
        clip_norm: largest norm of the gradient; `None` does not clip.
        precision: autocast to "bf16" or "fp16" (the latter on GPUs only), or "no".
        eval_every: optimizer steps between validations and checkpoints; `None` is once an epoch.
        eval_samples: draws a member in validation; `None` takes the posterior mean.
        log_every: optimizer steps between lines of the log.
        workers: processes that load data.
        trackers: experiment trackers known to Accelerate, such as "tensorboard" or "wandb".
        seed: of data order, augmentation and noise.
    """

    epochs: int = 5
    steps: int | None = None
    batch_size: int = 32
    accumulation: int = 1
    train: Trained = "all"
    train_also: tuple[str, ...] = ()
    norms_and_biases: bool = False
    expand: Expansion = "replicate"
    likelihood: Likelihood = "average"
    kl_annealing: float = 0.67
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 3e-4
    factor_lr_multiplier: float = 10.0
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip_norm: float | None = 1.0
    precision: Precision = "no"
    eval_every: int | None = None
    eval_samples: int | None = None
    log_every: int = 10
    workers: int = 0
    trackers: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train_also", "trackers"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is unknown; expected one of {', '.join(map(repr, choices))}."
                )
        for name in ("epochs", "batch_size", "accumulation", "log_every", "steps", "eval_every", "eval_samples"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a positive integer; found {value!r}.")
        for name in ("kl_annealing", "warmup"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is a fraction of the steps, from 0 to 1; found {getattr(self, name)!r}.")
        for name in ("learning_rate", "factor_lr_multiplier", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ConfigError(f"{name} must be positive; found {value!r}.")
        for name in ("weight_decay", "workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative; found {getattr(self, name)!r}.")

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
