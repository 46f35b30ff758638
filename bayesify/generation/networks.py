"""What the networks do while transformers' `generate` runs with R rows.

n = K·S networks, S draws of each of K members. A forward pass gets R rows, computes n·R, and gives R rows of the
mixture back. Row (m·B + b)·c + j is network m, prompt b, copy j (a beam or a return sequence): network-major, with the
copies of a prompt as neighbors, which share the draw of their prompt. Caches and the encoder's outputs keep n·R rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayesify.batch import map_tensors
from bayesify.errors import DataError
from bayesify.generation.doubt import Doubt
from bayesify.predictive import Predictive

if TYPE_CHECKING:
    from bayesify.model import BayesianModel

_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
_AS_THEY_ARE = {"encoder_outputs", "past_key_values", "cache_params", "cache_position"}
"""Inputs that have n·R rows already, or none."""


class Networks:
    """All networks of a model, for one call of `generate`.

    Args:
        samples: S draws a member; `None` for the posterior means.
        copies: c rows of one prompt.
        doubt: is told the predictive of every step.
    """

    def __init__(self, bnn: BayesianModel, samples: int | None, seed: int | None, copies: int, doubt: Doubt) -> None:
        self.bnn = bnn
        self.samples = samples
        self.seed = seed
        self.copies = copies
        self.doubt = doubt
        self.count = bnn.members * (samples or 1)
        self.drawn = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, calls of the network (and of its encoder) are those of all networks; afterwards it is as it was."""
        model: Any = self.bnn.model
        self.drawn = False
        with ExitStack() as stack, self.bnn.passes.draws.drawn(slice(None), 1, seed=None):
            handles = [
                model.register_forward_pre_hook(self._enter, with_kwargs=True),
                model.register_forward_hook(self._leave),
            ]
            if model.config.is_encoder_decoder:
                handles.append(model.get_encoder().register_forward_pre_hook(self._encode, with_kwargs=True))
            for handle in handles:
                stack.callback(handle.remove)
            model._reorder_cache = self._reorder  # beam search asks the model first
            stack.callback(delattr, model, "_reorder_cache")
            yield

    def mean(self, value: Tensor) -> Tensor:
        """[n·R, ...] -> [R, ...]"""
        return value.unflatten(0, (self.count, -1)).float().mean(0).to(value.dtype)

    # ---------------------------------------------------------------------------- around the forward passes

    def _encode(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        main = kwargs.get(str(getattr(encoder, "main_input_name", "input_ids")))
        prompts = main if main is not None else next(v for v in kwargs.values() if isinstance(v, Tensor))
        self._draw(len(prompts))
        return args, self._expand(kwargs, len(prompts))

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = len(next(kwargs[name] for name in _TOKENS if kwargs.get(name) is not None))
        self._draw(rows // self.copies)
        self._check_cache(kwargs.get("past_key_values"), rows)
        return args, self._expand(kwargs, rows)

    def _leave(self, model: nn.Module, args: Any, output: Any) -> Any:
        """Put the mixture's logits [R, 1, V] of the last position in the place of those of all networks.

        A log-probability is what logits are but for a constant. The networks' average constant is put back, since
        some logits processors (the repetition penalty) look at the sign of logits: one network keeps its own.
        """
        logits = output.logits[:, -1].float()
        logits = logits / self.bnn.temperature
        predictive = Predictive(logits.unflatten(0, (self.bnn.members, self.samples or 1, -1)))
        self.doubt.see(predictive)
        constant = self.mean(logits.logsumexp(-1, keepdim=True))
        output.logits = (predictive.log_probs + constant)[:, None]
        return output

    def _reorder(self, cache: Any, beams: Tensor) -> Any:
        rows = torch.arange(self.count, device=beams.device)[:, None] * len(beams) + beams
        cache.reorder_cache(rows.flatten())
        return cache

    # ---------------------------------------------------------------------------- rows

    def _draw(self, prompts: int) -> None:
        """Give every factor its draws, [n·B, d] or [n, d], those of `predict`; once for the whole text."""
        if self.samples is None or self.drawn:
            return
        self.drawn = True
        factors = [factor for _, _, factor in self.bnn.factors()]
        draws: list[list[Tensor]] = [[] for _ in factors]
        for sample in range(self.samples):
            self.bnn.passes.draws.hold(slice(None), prompts, seed=(self.seed, sample))
            for held, factor in zip(draws, factors, strict=True):
                held.append(factor.value().unflatten(0, (self.bnn.members, -1)))
        for held, factor in zip(draws, factors, strict=True):
            factor.hold(torch.stack(held, 1).flatten(0, 2))

    def _expand(self, kwargs: Mapping[str, Any], rows: int) -> dict[str, Any]:
        """Repeat every input of R rows for all networks."""
        return {
            name: value
            if name in _AS_THEY_ARE
            else map_tensors(value, lambda tensor, name=name: self._repeat(name, tensor, rows))
            for name, value in kwargs.items()
        }

    def _repeat(self, name: str, value: Tensor, rows: int) -> Tensor:
        # Positions in space and time are [axes, R, T].
        dim = 1 if value.dim() == 3 and name == "position_ids" else 0
        if value.dim() == 0 or (value.shape[dim] == 1 and rows != 1):
            return value  # broadcasts
        if value.shape[dim] != rows:
            raise DataError(
                f"the network's input {name} has shape {tuple(value.shape)}; expected {rows} rows, one for each text, "
                "in its first dimension. Such inputs are not supported with several networks."
            )
        return value.repeat(*[self.count if d == dim else 1 for d in range(value.dim())])

    def _check_cache(self, cache: Any, rows: int) -> None:
        layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None) or []
        keys = getattr(layers[0], "keys", None) if layers else None
        if isinstance(keys, Tensor) and keys.numel() and len(keys) != self.count * rows:
            raise DataError(
                f"past_key_values holds {len(keys)} rows; expected {self.count * rows}, {rows} for each of "
                f"{self.count} networks. Give an empty cache, or one that came from this model's `generate`."
            )
