"""The fully Bayesian baseline: every weight and bias of a network with a normal distribution of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, parameters_to_vector
from torch.utils.data import TensorDataset
from transformers import get_cosine_schedule_with_warmup

from bayesify import FineTuneConfig, Predictive
from bayesify.evaluation import collect


class MeanField(nn.Module):
    """A network with w ~ N(mu, softplus(rho)²) a posteriori and N(0, prior_scale²) a priori for each of its P weights.

    One draw of all weights a forward, shared by its examples and, in a recurrent network, by the steps in time.
    `members` and `predict` are what `bayesify.evaluation.collect` asks for.

    Args:
        network: a plain network; the means start at its weights. It is frozen.
        prior_scale: standard deviation of the prior.
        spread: standard deviation of the posterior at the start.
    """

    members = 1

    def __init__(self, network: nn.Module, prior_scale: float, spread: float) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.prior_scale = prior_scale
        self.mu = nn.Parameter(parameters_to_vector(network.parameters()).clone())
        self.rho = nn.Parameter(torch.full_like(self.mu, math.log(math.expm1(spread))))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(self.mu.shape, generator=generator)
        draw = self.mu + F.softplus(self.rho) * noise
        own = dict(self.network.named_parameters())
        parts = draw.split([weight.numel() for weight in own.values()])
        weights = {name: part.view_as(own[name]) for name, part in zip(own, parts, strict=True)}
        return torch.func.functional_call(self.network, weights, (x,))

    def kl(self) -> Tensor:
        """KL(posterior ‖ prior) = Σ log(σ/s) + (s² + mu²)/(2σ²) − ½ over all weights, a scalar in nats."""
        s = F.softplus(self.rho)
        ratio = (s.square() + self.mu.square()) / (2 * self.prior_scale**2)
        return (math.log(self.prior_scale) - s.log() + ratio - 0.5).sum()

    @torch.no_grad()
    def predict(self, x: Tensor, *, samples: int | None = None, seed: int = 0, **_: Any) -> Predictive:
        """[1, S, B, C] outputs of `samples` draws (1 if None), without dropout."""
        generator = torch.Generator().manual_seed(seed)
        mode = self.training
        self.eval()
        outputs = torch.stack([self(x, generator) for _ in range(samples or 1)])
        self.train(mode)
        return Predictive(outputs[None])


def train_mean_field(
    model: MeanField, train: TensorDataset, validation: Sequence[tuple[Tensor, Tensor]], config: FineTuneConfig
) -> list[float]:
    """What `FineTuner` does, for a `MeanField`: it ends at the state with the best validation NLL.

    AdamW with linear warm-up and cosine, the loss mean NLL + κ KL / N with κ rising linearly, clipped gradients. All
    options of the config that concern these are read, and no others; weight decay is the prior's business.

    Returns:
        The validation NLLs, in nats.
    """
    features, labels = train.tensors
    size = min(config.batch_size, len(labels))
    per_epoch = len(labels) // size
    total = config.steps or config.epochs * per_epoch
    weights = [model.mu, model.rho]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * total), total)
    annealing = max(1, round(config.kl_annealing * total))
    history: list[float] = []
    best: dict[str, Tensor] = {}
    torch.manual_seed(config.seed)
    order = torch.Generator().manual_seed(config.seed)
    batches: list[Tensor] = []
    for step in range(total):
        if step % per_epoch == 0:
            batches = list(torch.randperm(len(labels), generator=order).split(size))
        rows = batches[step % per_epoch]
        model.train()
        nll = F.cross_entropy(model(features[rows]), labels[rows])
        (nll + min(1.0, (step + 1) / annealing) * model.kl() / len(labels)).backward()
        if config.clip_norm is not None:
            clip_grad_norm_(weights, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if (step + 1) % (config.eval_every or per_epoch) == 0 or step + 1 == total:
            predictive, targets = collect(
                model, validation, samples=config.eval_samples, seed=config.seed, progress=False
            )
            history.append(float(predictive.nll(targets)))  # type: ignore[arg-type]
            if history[-1] == min(history):
                best = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best)
    model.eval()
    return history
