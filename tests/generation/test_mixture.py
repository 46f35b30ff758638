"""Several networks write what a plain loop writes that averages their probabilities at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from writers import of_draws, of_members, prompt, searched, storyteller, writer, written

from bayesify import bayesify

NAMES = ["gpt2", "mistral", "mamba", "t5"]
ENDLESS = {"max_new_tokens": 8, "min_new_tokens": 8, "eos_token_id": None}


def _bayesian(name: str, **options: Any) -> Any:
    model = writer(name)
    torch.manual_seed(1)
    return bayesify(model, **{"members": 4, "init_scale": 0.4, **options})


def _start(bnn: Any, row: Tensor) -> tuple[Tensor, Tensor | None]:
    """The first tokens of the text, and what an encoder reads."""
    return (torch.zeros(1, 1, dtype=torch.long), row) if bnn.model.config.is_encoder_decoder else (row, None)


@pytest.mark.parametrize("draw", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", NAMES)
def test_text_and_doubt(name: str, draw: bool) -> None:
    bnn = _bayesian(name)
    tokens, source = _start(bnn, prompt())
    torch.manual_seed(5)
    text, entropy, mutual_information = written(of_members(bnn, source), tokens, 8, draw)
    torch.manual_seed(5)
    found = bnn.generate(prompt(), do_sample=draw, top_k=0, **ENDLESS)
    assert torch.equal(found.sequences, text)
    torch.testing.assert_close(found.entropy[0], entropy, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.mutual_information[0], mutual_information, rtol=1e-3, atol=1e-3)
    assert mutual_information.max() > 0.05


@pytest.mark.parametrize("name", ["gpt2", "mistral", "t5"])
def test_beams(name: str) -> None:
    bnn = _bayesian(name, member_bias=True)
    with torch.no_grad():
        for parameter_name, parameter in bnn.named_parameters():
            if "own_bias" in parameter_name:
                parameter.normal_(0, 0.3)
    rows = prompt(2)
    found = bnn.generate(
        rows, num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True, **ENDLESS
    )
    for number, row in enumerate(rows):
        tokens, source = _start(bnn, row[None])
        best = searched(of_members(bnn, source), tokens, 8, 3)[:2]
        for place, (score, text, doubts) in enumerate(best, 2 * number):
            assert torch.equal(found.sequences[place], text[0])
            assert found.sequences_scores[place] * 8 == pytest.approx(score, abs=1e-3)
            of_tokens = torch.stack([found.entropy[place], found.mutual_information[place]], 1)
            torch.testing.assert_close(of_tokens, torch.tensor(doubts), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("noise", ["example", "member"])
def test_draws_are_those_of_predictions(noise: str) -> None:
    bnn = _bayesian("gpt2", members=2, noise=noise, posterior_scale=0.5)
    text, entropy, mutual_information = written(of_draws(bnn, 3, seed=9), prompt(), 6)
    options = {**ENDLESS, "max_new_tokens": 6, "min_new_tokens": 6, "samples": 3}
    found = bnn.generate(prompt(), seed=9, **options)
    assert torch.equal(found.sequences, text)
    torch.testing.assert_close(found.entropy[0], entropy, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.mutual_information[0], mutual_information, rtol=1e-3, atol=1e-3)
    assert torch.equal(bnn.generate(prompt(), seed=9, **options).entropy, found.entropy)
    assert not torch.equal(bnn.generate(prompt(), seed=10, **options).entropy, found.entropy)
    torch.manual_seed(2)
    unseeded = bnn.generate(prompt(), **options).entropy
    torch.manual_seed(2)
    assert torch.equal(bnn.generate(prompt(), **options).entropy, unseeded)


def test_encoder_has_the_draws_of_the_decoder() -> None:
    bnn = _bayesian("t5", members=2, posterior_scale=0.5)
    first = bnn.predict(
        input_ids=prompt(2), decoder_input_ids=torch.zeros(2, 1, dtype=torch.long), samples=3, seed=4
    ).outputs[:, :, :, -1]
    mean = first.softmax(-1).mean((0, 1))
    found = bnn.generate(prompt(2), samples=3, seed=4, max_new_tokens=1, num_return_sequences=3, do_sample=True)
    torch.testing.assert_close(found.entropy[::3, 0], torch.special.entr(mean).sum(-1), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.entropy.view(2, 3), found.entropy[::3].expand(2, 3))


def test_rows_of_a_prompt_share_a_draw() -> None:
    bnn = _bayesian("gpt2", members=2, posterior_scale=0.5)
    same = prompt().expand(2, -1)
    found = bnn.generate(same, samples=2, seed=1, do_sample=True, top_k=1, num_return_sequences=3, max_new_tokens=5)
    first, second = found.entropy[:, :1].view(2, 3)
    torch.testing.assert_close(first, first[:1].expand(3))
    assert not torch.isclose(first[0], second[0])


def test_padded_prompts_are_written_as_alone(data_dir: Path) -> None:
    model, tokenizer = storyteller(data_dir)
    bnn = bayesify(model, members=4, init_scale=0.1)
    texts = ["Once upon a time, there was a little girl", "Tom", "The cat sat on the"]
    options = {"max_new_tokens": 12, "num_beams": 2}
    together = bnn.generate(**tokenizer(texts, return_tensors="pt", padding=True), **options)
    for row, text in enumerate(texts):
        alone = bnn.generate(**tokenizer([text], return_tensors="pt"), **options)
        assert torch.equal(together.sequences[row, -12:], alone.sequences[0, -12:])
        torch.testing.assert_close(together.entropy[row], alone.entropy[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(together.mutual_information[row], alone.mutual_information[0], rtol=1e-3, atol=1e-3)
