"""Tiny models that write, and the loop that generation must agree with: no cache, no padding, one network at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 40
_WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        {**_WIDE, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        {**_WIDE, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 16, "attention_window_size": 4},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    ),
}


def writer(name: str, seed: int = 0, **settings: Any) -> Any:
    """A model with random weights, large enough for its tokens to differ in probability."""
    import transformers

    config, model, usual = _SETTINGS[name]
    torch.manual_seed(seed)
    network = getattr(transformers, model)(getattr(transformers, config)(**{**_COMMON, **usual, **settings})).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D":
                module.weight.normal_(0, 0.4)  # type: ignore[union-attr]
        for embedding in (network.get_input_embeddings(), network.get_output_embeddings()):
            embedding.weight.normal_()
    return network


def storyteller(data_dir: Path) -> tuple[Any, Any]:
    """The small Llama that writes stories, and its tokenizer, which pads on the left."""
    import transformers

    folder = data_dir / "checkpoints" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left", pad_token="<unk>")
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer


def prompt(rows: int = 1, length: int = 5) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))


Probabilities = Callable[[Tensor], Tensor]
"""Tokens [1, T] so far -> [n, V] probabilities of the next token, one row for each network."""


def of_members(bnn: Any, source: Tensor | None = None) -> Probabilities:
    """The members as plain networks; `source` [1, T] is what an encoder reads."""
    plain = [bnn.merge(member) for member in range(bnn.members)]

    @torch.no_grad()
    def probabilities(tokens: Tensor) -> Tensor:
        inputs = {"input_ids": tokens} if source is None else {"input_ids": source, "decoder_input_ids": tokens}
        return torch.cat([network(**inputs, use_cache=False).logits[:, -1].softmax(-1) for network in plain])

    return probabilities


def of_draws(bnn: Any, samples: int, seed: int) -> Probabilities:
    """The networks that `predict` draws."""

    def probabilities(tokens: Tensor) -> Tensor:
        return bnn.predict(input_ids=tokens, samples=samples, seed=seed).outputs[:, :, 0, -1].flatten(0, 1).softmax(-1)

    return probabilities


def written(
    probabilities: Probabilities, tokens: Tensor, steps: int, draw: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """[1, T] the text, and [steps] entropy and mutual information in nats."""
    doubts = []
    for _ in range(steps):
        networks = probabilities(tokens)
        mean = networks.mean(0)
        token = torch.multinomial(mean, 1) if draw else mean.argmax(keepdim=True)
        tokens = torch.cat([tokens, token[None]], 1)
        doubts.append(_doubt(networks))
    return tokens, *torch.tensor(doubts).T


def searched(
    probabilities: Probabilities, tokens: Tensor, steps: int, beams: int
) -> list[tuple[float, Tensor, list[tuple[float, float]]]]:
    """(log-probability, [1, T] text, (entropy, mutual information) of its tokens) of each beam, best first."""
    found: list[tuple[float, Tensor, list[tuple[float, float]]]] = [(0.0, tokens, [])]
    for _ in range(steps):
        longer = []
        for score, text, doubts in found:
            networks = probabilities(text)
            told = [*doubts, _doubt(networks)]
            for token, value in enumerate(networks.mean(0).log().tolist()):
                longer.append((score + value, torch.cat([text, torch.tensor([[token]])], 1), told))
        found = sorted(longer, key=lambda beam: -beam[0])[:beams]
    return found


def _doubt(networks: Tensor) -> tuple[float, float]:
    entropy = _entropy(networks.mean(0))
    return entropy, entropy - sum(_entropy(network) for network in networks) / len(networks)


def _entropy(probabilities: Tensor) -> float:
    values = probabilities.double().clamp_min(1e-300)
    return float(-(values * values.log()).sum())
