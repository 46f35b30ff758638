"""The networks that speed and memory are measured on, with random weights and inputs."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "integrations" / "cifar"))

VOCABULARY, PROMPT, QUERY, STEPS = 32_000, 128, 64, 48


@dataclass(frozen=True)
class Network:
    """A network to be timed.

    Attributes:
        build: makes it, with random weights.
        inputs: number of examples -> keyword inputs, or a single tensor.
        classes: of its outputs, which are logits with the classes last.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    classes: int

    def call(self, model: nn.Module, inputs: Any) -> Tensor:
        """The logits."""
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        return output if isinstance(output, Tensor) else output.logits


class Recurrent(nn.Module):
    """Two layers of LSTM over 48 hours of records, and the logits of the last one [B, 2]."""

    def __init__(self, channels: int = 76, hidden: int = 256) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name)

    return build


def _wide_resnet() -> nn.Module:
    from wide_resnet import WideResNet  # type: ignore[import-not-found]

    return WideResNet(28, 10)


def _minilm() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertForSequenceClassification(BertConfig(**sizes, num_labels=150))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, use_cache=False, **sizes))


def _images(size: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, 3, size, size)


def _tokens(vocabulary: int, length: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda batch: {"input_ids": torch.randint(vocabulary, (batch, length))}


NETWORKS = {
    "resnet50": Network(_timm("resnet50"), _images(224), 1000),
    "wrn28_10": Network(_wide_resnet, _images(32), 10),
    "vit_small": Network(_timm("vit_small_patch16_224"), _images(224), 1000),
    "convnext_tiny": Network(_timm("convnext_tiny"), _images(224), 1000),
    "minilm": Network(_minilm, _tokens(30_522, QUERY), 150),
    "lstm": Network(Recurrent, lambda batch: torch.randn(batch, STEPS, 76), 2),
    "llama": Network(_llama, _tokens(VOCABULARY, PROMPT), VOCABULARY),
}


def jobs_of(only: str, batches: str) -> list[tuple[str, int]]:
    """(name of a network, number of examples) for the names that fit a glob, and numbers between commas."""
    return [(name, int(batch)) for name in NETWORKS if fnmatch.fnmatch(name, only) for batch in batches.split(",")]
