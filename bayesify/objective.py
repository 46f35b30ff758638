"""The training objective: the evidence lower bound, as a loss for each example."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from bayesify.batch import Rows, loss_of
from bayesify.errors import ConfigError, DataError
from bayesify.model import BayesianModel
from bayesify.tasks import TASKS, Regression, TaskName, check_guess, log_mean_exp, resolve_task

Likelihood = Literal["average", "mixture"]


@dataclass(frozen=True)
class ELBOTerms:
    """The loss and its parts, scalars in nats: loss = nll + weight · kl / (N · V), weight = temperature · κ(t).

    V is the number of target values (tokens, pixels, labels) of an example, whose mean nll is: 1 for a class.
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor
    weight: float


class ELBO:
    """loss = mean over members and target values of NLL + T · κ(t) · KL / (N · V)   (paper Eq. 2, divided by N · V).

    V is the number of target values of an example in the batch, on average: 1 for a class, as many as there are tokens
    or pixels that count, D for D numbers. The loss times N · V is the negative bound on all data.

    Args:
        model: the Bayesian model whose KL counts.
        num_examples: N, the number of training examples. The division by N · V happens here and nowhere else.
        annealing_steps: κ rises linearly, κ(t) = min(1, (t + 1) / annealing_steps); 0 keeps it at 1.
        likelihood: "average" takes the mean of the members' log-likelihoods (better on test data: paper, Fig. 4);
            "mixture" the log-likelihood of the members' mean probability.
        kl_temperature: T; the paper stresses that 1, the bound itself, is enough.

    Weight decay is the optimizer's business, and applies to slow weights only.
    """

    def __init__(
        self,
        model: BayesianModel,
        num_examples: int,
        *,
        annealing_steps: int = 0,
        likelihood: Likelihood = "average",
        kl_temperature: float = 1.0,
    ) -> None:
        if num_examples < 1:
            raise ConfigError(f"num_examples must be the number of training examples; found {num_examples}.")
        if annealing_steps < 0:
            raise ConfigError(f"annealing_steps must not be negative; found {annealing_steps}.")
        if likelihood not in ("average", "mixture"):
            raise ConfigError(f"likelihood must be 'average' or 'mixture'; found {likelihood!r}.")
        if not 0.0 <= kl_temperature < math.inf:
            raise ConfigError(f"kl_temperature must not be negative; found {kl_temperature!r}.")
        self.model = model
        self.kl_temperature = kl_temperature
        self.num_examples = num_examples
        self.annealing_steps = annealing_steps
        self.likelihood: Likelihood = likelihood

    def weight(self, step: int) -> float:
        """T · κ(step), with κ in (0, 1]."""
        annealing = min(1.0, (step + 1) / self.annealing_steps) if self.annealing_steps else 1.0
        return self.kl_temperature * annealing

    def __call__(
        self, output: Any, targets: Tensor | None = None, step: int | None = None, *, values: float = 1.0
    ) -> ELBOTerms:
        """The loss of one training batch.

        Args:
            output: what the model returned in training: [K·B, ..., C] or an output with `logits`; or, with
                targets=None, an output with a `loss` that is already the mean over members.
            targets: [B, ...] labels, not repeated. With a partitioned batch, in its order.
            step: t of the annealing; `None` takes κ = 1.
            values: with targets=None, V: how many values the output's loss is the mean of, for each example.
        """
        nll, per_example = self._nll(output, targets, values)
        kl = self.model.kl().to(nll.device)
        weight = self.kl_temperature if step is None else self.weight(step)
        return ELBOTerms(nll + weight * kl / (self.num_examples * per_example), nll, kl, weight)

    def _nll(self, output: Any, targets: Tensor | None, values: float) -> tuple[Tensor, Tensor | float]:
        """The mean NLL of target values, and V."""
        if targets is None:
            loss = loss_of(output)
            if loss is None:
                raise DataError("the batch has no targets and the model's output has no loss; give one of them.")
            if self.model.kl_weight:
                raise ConfigError("the network's own loss already has the KL: set the model's kl_weight to 0.")
            if self.likelihood == "mixture" and self.model.members > 1:
                raise ConfigError(
                    "likelihood='mixture' needs the members' outputs, but the network gave its own loss, which is "
                    "their average; use likelihood='average'."
                )
            return loss, values
        outputs = Rows(self.model.model).outputs(output)
        members = self.model.members
        partitioned = self.model.expansion == "partition"
        if outputs.shape[0] != targets.shape[0] * (1 if partitioned else members):
            raise DataError(
                f"outputs of {outputs.shape[0]} rows do not fit {targets.shape[0]} targets and {members} members "
                f"({'partitioned' if partitioned else 'replicated'})."
            )
        if self.likelihood == "mixture" and members > 1 and partitioned:
            raise ConfigError("likelihood='mixture' needs every member to see every example; use expand='replicate'.")
        given = self.model.task
        task: TaskName = resolve_task(outputs, given)
        check_guess(given, task, targets)
        nll = task_nll(outputs, targets, task, members=1 if partitioned else members, likelihood=self.likelihood)
        return nll, TASKS[task].count(targets).to(nll.device) / len(targets)


def task_nll(
    outputs: Tensor, targets: Tensor, task: TaskName | None, *, members: int = 1, likelihood: Likelihood = "average"
) -> Tensor:
    """Mean NLL, a scalar in nats, of the target values that count, from a network's own outputs of members·B rows."""
    reading = TASKS[resolve_task(outputs, task)]
    rows = reading.arranged(outputs).unflatten(0, (members, -1))
    rows = reading.fitted(rows, targets)
    if likelihood == "average":
        mixed = reading.log_prob(rows, targets).mean(0)
    elif isinstance(reading, Regression):  # whose predictive is that of the mean: here each member is a normal
        mixed = log_mean_exp(reading.log_prob(rows, targets))
    else:
        mixed = reading.mixture_log_prob(rows, targets)
    return -mixed.sum() / reading.count(targets).to(mixed.device)
