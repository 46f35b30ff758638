"""The networks that speed and memory are measured on, with random weights and inputs."""

from __future__ import annotations

import fnmatch
import re
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
        late: its last stage and head, as patterns of sites.
        tail: what of a call is after the input of the last stage.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    classes: int
    late: tuple[str, ...] = ()
    tail: Callable[[nn.Module, Tensor], Tensor] | None = None

    def call(self, model: Callable[..., Any], inputs: Any) -> Tensor:
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


def _resnet_tail(model: Any, x: Tensor) -> Tensor:
    return model.forward_head(model.layer4(x))


def _convnext_tail(model: Any, x: Tensor) -> Tensor:
    return model.forward_head(model.norm_pre(model.stages[-1](x)))


NETWORKS = {
    "resnet50": Network(_timm("resnet50"), _images(224), 1000, ("layer4", "fc"), _resnet_tail),
    "wrn28_10": Network(_wide_resnet, _images(32), 10),
    "vit_small": Network(_timm("vit_small_patch16_224"), _images(224), 1000),
    "convnext_tiny": Network(_timm("convnext_tiny"), _images(224), 1000, ("stages.3", "head"), _convnext_tail),
    "minilm": Network(_minilm, _tokens(30_522, QUERY), 150),
    "lstm": Network(Recurrent, lambda batch: torch.randn(batch, STEPS, 76), 2),
    "llama": Network(_llama, _tokens(VOCABULARY, PROMPT), VOCABULARY),
}


def fits(name: str, patterns: str) -> bool:
    """Whether a name fits one of the globs between commas; names in them may hold commas with a space after."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in re.split(r",(?! )", patterns))


def jobs_of(only: str, batches: str) -> list[tuple[str, int]]:
    """(name of a network, number of examples) for the names that fit globs, and numbers between commas."""
    return [(name, int(batch)) for name in NETWORKS if fits(name, only) for batch in batches.split(",")]
