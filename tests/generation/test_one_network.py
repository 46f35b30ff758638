"""With one member whose factors are 1, generation is the base model's own, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from writers import prompt, storyteller, writer

from bayesify import bayesify

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 12},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "repetition penalty": {"repetition_penalty": 1.8, "no_repeat_ngram_size": 3},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 2},
}


def _agree(model: Any, inputs: dict[str, Any], options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    expected = model.generate(**inputs, **options, max_new_tokens=12)
    bnn = bayesify(model, members=1, init="ones")
    torch.manual_seed(3)
    found = bnn.generate(**inputs, **options, max_new_tokens=12)
    assert torch.equal(found.sequences, expected)
    assert found.mutual_information.nan_to_num().max() < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stories(data_dir: Path, strategy: str) -> None:
    model, tokenizer = storyteller(data_dir)
    texts = ["Once upon a time"] if "chunks" in strategy else ["Once upon a time", "Lily"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    _agree(model, dict(inputs), STRATEGIES[strategy])


@pytest.mark.parametrize("strategy", ["greedy", "sampling", "beams", "beam sampling"])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "mamba", "t5"])
def test_tiny_models(name: str, strategy: str) -> None:
    _agree(writer(name), {"input_ids": prompt(2)}, STRATEGIES[strategy])


def test_static_cache_of_an_encoder_decoder() -> None:
    _agree(writer("t5"), {"input_ids": prompt(2)}, {"cache_implementation": "static", "num_beams": 2})


def test_embeddings_as_the_prompt() -> None:
    model = writer("gpt2")
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(prompt(2))
    _agree(model, {"inputs_embeds": embeddings}, {"num_beams": 2})


def test_everything_transformers_returns() -> None:
    model = writer("t5")
    wanted = {
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_attentions": True,
        "output_hidden_states": True, "num_beams": 2, "max_new_tokens": 4,
    }  # fmt: skip
    expected = model.generate(prompt(2), **wanted)
    found = bayesify(model, members=1, init="ones").generate(prompt(2), **wanted)
    assert set(found) == {*expected, "entropy", "mutual_information"}
    for name in set(expected) - {"past_key_values"}:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
