"""Options of fine-tuning, one frozen dataclass."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from accelerate.utils import LoggerType

from bayesify.config import as_names, check_choices, check_flags, check_number
from bayesify.errors import ConfigError
from bayesify.model import Expansion
from bayesify.objective import Likelihood

Trained = Literal["factors", "all"]
OptimizerName = Literal["adamw", "sgd"]
ScheduleName = Literal["cosine", "linear", "constant", "steps"]
Decayed = Literal["kernels", "biases", "norms"]
Precision = Literal["no", "bf16", "fp16"]

_CHOICES = {
    "train": get_args(Trained),
    "optimizer": get_args(OptimizerName),
    "schedule": get_args(ScheduleName),
    "expand": get_args(Expansion),
    "likelihood": get_args(Likelihood),
    "precision": get_args(Precision),
}

_OPTIONAL_COUNTS = ("steps", "eval_every", "eval_samples")


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
        freeze_batch_norm: batch norms keep their running statistics and normalize with them, as in evaluation; scales
            and shifts train as ever. Small batches give poor statistics, and members see one another through them: with
            members that differ in the last stage, and for plain networks, this was much better (benchmarks/quality).
            But then nothing rescales what the factors or a large learning rate do to activations. Off by default, and
            not for training from scratch.
        expand: "replicate" shows every example to every member; "partition" gives each member B/K of the batch.
        likelihood: "average" of the members' log-likelihoods, or of the "mixture".
        train_samples: draws of the factors for each row and step; the losses of several are averaged, one forward each.
        kl_annealing: the weight of the KL rises linearly to 1 over this fraction of the steps; beyond 1 it ends lower.
        kl_temperature: multiplies the KL once more; below 1 the posterior is colder. 1, as published, is the bound.
        optimizer: "adamw" or "sgd" (with Nesterov momentum).
        momentum: of SGD.
        learning_rate: peak learning rate of slow weights.
        factor_lr_multiplier: the factors' learning rate is this many times larger.
        weight_decay: of the kinds of weights that `weight_decay_on` names, never of factors. It adds weight_decay times
            the weight to SGD's gradient, twice the factor of a penalty θ².
        weight_decay_on: kinds of weights that decay: "kernels" (of two dimensions and more), "biases" (vectors beside a
            kernel), "norms" (all other vectors). What a member has of its own decays with its kind, to what all share.
        schedule: after a linear warm-up, "cosine" or "linear" to zero, "constant", or "steps" down at the milestones.
        milestones: fractions of the steps at which schedule="steps" multiplies the learning rate.
        decay_factor: by which it does.
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
    freeze_batch_norm: bool = False
    expand: Expansion = "replicate"
    likelihood: Likelihood = "average"
    train_samples: int = 1
    kl_annealing: float = 0.67
    kl_temperature: float = 1.0
    optimizer: OptimizerName = "adamw"
    momentum: float = 0.9
    learning_rate: float = 3e-4
    factor_lr_multiplier: float = 10.0
    weight_decay: float = 0.01
    weight_decay_on: tuple[Decayed, ...] = ("kernels",)
    schedule: ScheduleName = "cosine"
    milestones: tuple[float, ...] = ()
    decay_factor: float = 0.1
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
        for name in ("train_also", "trackers", "weight_decay_on"):
            object.__setattr__(self, name, as_names(name, getattr(self, name)))
        milestones = self.milestones if isinstance(self.milestones, (tuple, list)) else (self.milestones,)
        object.__setattr__(self, "milestones", tuple(milestones))
        check_choices(self, _CHOICES)
        check_flags(self, "norms_and_biases", "freeze_batch_norm")
        for kind in self.weight_decay_on:
            if kind not in get_args(Decayed):
                raise ConfigError(
                    f"weight_decay_on={kind!r} is unknown; expected some of {', '.join(map(repr, get_args(Decayed)))}."
                )
        for name in ("epochs", "batch_size", "accumulation", "train_samples", "log_every", *_OPTIONAL_COUNTS):
            value = getattr(self, name)
            # A recipe that counts in steps may be asked for epochs, and the other way round.
            if value is None and (name in _OPTIONAL_COUNTS or (name == "epochs" and self.steps is not None)):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer; found {value!r}.")
        check_number("workers", self.workers, "an integer and not negative", lambda v: isinstance(v, int) and v >= 0)
        check_number(
            "seed", self.seed, "an integer from 0 to 2**31 - 1", lambda v: isinstance(v, int) and 0 <= v < 2**31
        )
        if unknown := sorted(set(self.trackers) - {tracker.value for tracker in LoggerType}):
            known = ", ".join(sorted(tracker.value for tracker in LoggerType))
            raise ConfigError(f"trackers={unknown[0]!r} is unknown; expected some of {known}.")
        for name, value in (("warmup", self.warmup), *(("milestones", value) for value in self.milestones)):
            check_number(name, value, "a fraction of the steps, from 0 to 1", lambda v: 0.0 <= v <= 1.0)
        for name in ("learning_rate", "factor_lr_multiplier", "decay_factor"):
            check_number(name, getattr(self, name), "positive", lambda v: 0.0 < v < math.inf)
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, "positive", lambda v: 0.0 < v < math.inf)
        for name in ("weight_decay", "kl_annealing", "kl_temperature"):
            check_number(name, getattr(self, name), "finite and not negative", lambda v: 0.0 <= v < math.inf)
        check_number("momentum", self.momentum, "in [0, 1)", lambda v: 0.0 <= v < 1.0)
        if (self.schedule == "steps") != bool(self.milestones):
            raise ConfigError(
                f"schedule='steps' and milestones go together; found schedule={self.schedule!r} and "
                f"milestones={self.milestones}."
            )
        if self.likelihood == "mixture" and self.expand == "partition":
            raise ConfigError("likelihood='mixture' needs every member to see every example; use expand='replicate'.")

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
