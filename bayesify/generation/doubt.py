"""The doubt of each token: recorded as the text grows, read off along the sequences that are returned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from bayesify.predictive import Predictive


class Doubt(LogitsProcessor):
    """Entropy and mutual information of every step of the decoding loop.

    `see` tells it what the networks say about the next token; that the loop then asks it, among the logits
    processors, for the scores of that token (which it leaves alone) makes it a step.

    Attributes:
        steps: [2, R] entropy and mutual information in nats, of each step.
        prompt: length of the sequences at the first step.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.prompt = 0
        self._seen: Tensor | None = None

    def see(self, predictive: Predictive) -> None:
        self._seen = torch.stack([predictive.entropy, predictive.mutual_information])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.steps:
            self.prompt = input_ids.shape[1]
        if self._seen is not None:
            self.steps.append(self._seen.to(input_ids.device))
        return scores

    def of_tokens(
        self, sequences: Tensor, beams: Tensor | None, eos: int | Sequence[int] | None, pad: int | None
    ) -> tuple[Tensor, Tensor]:
        """Entropy and mutual information [rows, N] of the new tokens of sequences [rows, T]; NaN after their ends.

        `beams` [rows, N] are the rows from which beam search took each token, −1 after the end.
        """
        new = sequences[:, self.prompt :]
        count = new.shape[1]
        doubt = torch.stack(self.steps[:count], -1) if count else sequences.new_zeros(2, len(sequences), 0).float()
        if beams is None:
            ended = _ended(new, eos, pad)
        else:
            ended = beams < 0
            doubt = doubt[:, beams.clamp_min(0).long(), torch.arange(count, device=beams.device)]
        entropy, mutual_information = doubt.masked_fill(ended, torch.nan)
        return entropy, mutual_information


def _ended(new: Tensor, eos: int | Sequence[int] | None, pad: int | None) -> Tensor:
    """[rows, N] which new tokens only fill a sequence up: those after its first end token, and padding at its end.

    Where padding is an end token and a text ends without one (by a stop string), the first that fills it up looks
    like its end.
    """
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    is_end = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device))
    after = is_end.cumsum(1) - is_end.long() > 0
    if pad is None or pad in ends:
        return after
    return after | (new != pad).flip(1).cumsum(1).flip(1).eq(0)
