"""An LSTM over hours with two logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MortalityLSTM(nn.Module):
    """Features [B, 48, F] to the logits [B, 2] of surviving and dying, read off the last hour.

    Args:
        features: F.
        hidden: size of the state.
        dropout: rate, on the last state.

    The start is the published one: Glorot-uniform input kernel, orthogonal recurrent kernel, forget gate open. Of
    torch's two biases, the input's gets the 1 of the forget gate, so that the sum of the two is 1.
    """

    def __init__(self, features: int, hidden: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, 2)
        with torch.no_grad():
            nn.init.xavier_uniform_(self.lstm.weight_ih_l0)
            nn.init.orthogonal_(self.lstm.weight_hh_l0)
            nn.init.zeros_(self.lstm.bias_ih_l0)
            nn.init.zeros_(self.lstm.bias_hh_l0)
            self.lstm.bias_ih_l0[hidden : 2 * hidden] = 1.0  # gates are in the order input, forget, cell, output
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.lstm(x)[0][:, -1]))
