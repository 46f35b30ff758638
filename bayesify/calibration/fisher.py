"""The Fisher information of the factors, from the gradients of single examples.

Legend: K members, B examples of a batch, N of all, D elements of all factors of one member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from bayesify.batch import Rows, split_batch
from bayesify.errors import DataError
from bayesify.modes import differentiable_recurrence, evaluating
from bayesify.tasks import resolve_task

if TYPE_CHECKING:
    from bayesify.model import BayesianModel


def fisher(bnn: BayesianModel, loader: Iterable[Any], seed: int = 0) -> tuple[list[Tensor], int]:
    """[K, d] mean over examples of the squared gradient of log p(y | x), for each factor at its mean, and N.

    y is drawn from the member's own prediction, which makes this the diagonal of the Fisher information, not of the
    empirical one. Labels in the data are not used. Every row has its own copy of the factors, so one backward pass
    gives the gradients of all examples.

    Raises:
        DataError: no examples, or outputs that are not classes.
    """
    means = [factor.mean for _, _, factor in bnn.factors()]
    sums = [torch.zeros(mean.shape, dtype=torch.float64) for mean in means]  # on the CPU: not all devices have it
    count = 0
    for member, gradients in example_gradients(bnn, loader, range(bnn.members), seed):
        for total, gradient in zip(sums, gradients, strict=True):
            total[member] += _squares(gradient)
        count += len(gradients[0]) if member == 0 else 0
    if not count:
        raise DataError("there is no example in the data: every batch is empty.")
    return [(total / count).to(mean) for total, mean in zip(sums, means, strict=True)], count


def low_rank_fisher(bnn: BayesianModel, loader: Iterable[Any], rank: int, seed: int = 0) -> tuple[Tensor, Tensor, int]:
    """The Fisher information of the first member's factors as Uᵀ U + diag(v): U [rank, D], v [D], and N.

    U holds the strongest directions, from a singular value decomposition that is renewed batch by batch on a sketch of
    five times as many; v is the rest of the exact diagonal. Otherwise as `fisher`.
    """
    sketch, diagonal, count = torch.zeros(0), torch.zeros(0), 0
    for _, gradients in example_gradients(bnn, loader, range(1), seed):
        rows = torch.cat(gradients, 1)
        squares = _squares(rows)
        sketch, diagonal = (torch.cat([sketch, rows]), diagonal + squares) if count else (rows, squares)
        count += len(rows)
        sketch = _strongest(sketch, 5 * rank)
    if not count:
        raise DataError("there is no example in the data: every batch is empty.")
    directions = _strongest(sketch, rank) / count**0.5
    rest = (diagonal / count).to(directions) - directions.square().sum(0)
    return directions, rest.clamp_min(0.0), count


def _strongest(rows: Tensor, rank: int) -> Tensor:
    """[rank, D] (or fewer) with, of all such, the product Rᵀ R nearest to that of the rows."""
    if len(rows) <= rank:
        return rows
    _, vectors = torch.linalg.eigh((rows @ rows.T).cpu().double())
    return vectors[:, -rank:].T.to(rows) @ rows


def _squares(rows: Tensor) -> Tensor:
    """[D] the sum of squares of a batch, in float64 on the CPU."""
    return rows.float().square().sum(0).cpu().double()


def example_gradients(
    bnn: BayesianModel, loader: Iterable[Any], members: range, seed: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """(member, [B, d] for each factor) of each batch: gradients of log p(y | x), y drawn from the prediction."""
    factors = [factor for _, _, factor in bnn.factors()]
    device = factors[0].mean.device
    generator = torch.Generator(device).manual_seed(seed)
    with evaluating(bnn), differentiable_recurrence(bnn), torch.enable_grad():
        for batch in loader:
            args, kwargs, _ = split_batch(send_to_device(batch, device))
            examples = Rows(bnn.model).batch_size(args, kwargs)
            if examples == 0:
                continue
            for member in members:
                call = partial(bnn.model, *args, **kwargs)
                mask = kwargs.get("attention_mask")
                yield member, _gradients(bnn, call, factors, member, examples, generator, mask)


def _gradients(
    bnn: BayesianModel,
    call: Callable[[], Any],
    factors: list[Any],
    member: int,
    examples: int,
    generator: Any,
    mask: Any = None,
) -> list[Tensor]:
    """[B, d] for each factor: the gradient of each example's log-likelihood of a label drawn for it.

    Of tokens, those count that the mask [B, T] does not call padding.
    """
    with bnn.passes.draws.drawn(slice(member, member + 1), examples, None):
        leaves = [factor.mean[member].detach().repeat(examples, 1).requires_grad_() for factor in factors]
        for factor, leaf in zip(factors, leaves, strict=True):
            factor.hold(leaf)
        logits = Rows(bnn.model).outputs(call())
        task = resolve_task(logits, bnn.task)
        if task != "classification":
            raise DataError(f"the Fisher information is computed for classes; these are outputs of a {task}.")
        log_probs = logits.float().log_softmax(-1).flatten(0, -2)
        if log_probs.isnan().any():
            raise DataError("the network's outputs hold NaN; look at the inputs and the precision (try float32).")
        labels = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        chosen = log_probs.gather(1, labels).squeeze(1)
        if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
            chosen = chosen * (mask != 0).flatten()
        return list(torch.autograd.grad(chosen.sum(), leaves))
