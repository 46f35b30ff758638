"""`bayesify generate`, and the text of single tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result
from writers import storyteller, writer

from bayesify import bayesify
from bayesify.cli import app
from bayesify.data import TextPreprocessing
from bayesify.generation.pieces import pieces


def _run(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(app, ["generate", *(str(argument) for argument in arguments)], **options)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """Single bytes are tokens, as in GPT-2, with special tokens at 0 to 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, words: PreTrainedTokenizerFast) -> Path:
    bnn = bayesify(writer("gpt2", vocab_size=len(words)), members=2, init_scale=0.3)
    bnn.preprocessing = TextPreprocessing(words)
    return bnn.save_pretrained(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("text", ["a naïve café", "日本語 ok", "smile 🙂 end", " spaced\nlines"])
def test_pieces_of_bytes(words: PreTrainedTokenizerFast, text: str) -> None:
    ids = words(text)["input_ids"]
    found = pieces(words, [1], [*ids, 2])
    assert "".join(found) == text
    assert len(found) == len(ids) + 1
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in found)
    assert pieces(words, [1], ids[:1]) == [words.decode(ids[:1])]


def test_pieces_of_words(data_dir: Path) -> None:
    _, tokenizer = storyteller(data_dir)
    text = "Once upon a time, a café 🙂 was"
    ids = tokenizer(text)["input_ids"]
    for start in (1, 3, 5):
        found = pieces(tokenizer, ids[:start], ids[start:])
        assert (
            tokenizer.decode(ids[:start], skip_special_tokens=True) + "".join(found)
            == "Once upon a time, a café 🙂 was"
        )
    assert pieces(tokenizer, ids[:3], ids[3:4])[0].startswith(" ")


def test_json_and_plain_text_agree_with_python(saved: Path, words: PreTrainedTokenizerFast) -> None:
    from bayesify import from_pretrained

    options = ["--max-new-tokens", 6, "--samples", 2, "--seed", 4, "--temperature", 0.7]
    result = _run(saved, "ab", "-", *options, "--json", input="longer\n")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["prompt"] for row in rows] == ["ab", "longer"]
    bnn = from_pretrained(saved)
    torch.manual_seed(4)
    inputs = words(["ab", "longer"], return_tensors="pt", padding=True, padding_side="left")
    found = bnn.generate(
        **inputs, max_new_tokens=6, samples=2, seed=4, do_sample=True, temperature=0.7, top_p=1.0, pad_token_id=0
    )
    for row, entropy, mutual_information in zip(rows, found.entropy, found.mutual_information, strict=True):
        assert row["text"] == "".join(token["text"] for token in row["tokens"])
        assert [token["entropy"] for token in row["tokens"]] == entropy[~entropy.isnan()].tolist()
        expected = mutual_information[~mutual_information.isnan()].tolist()
        assert [token["mutual_information"] for token in row["tokens"]] == expected
    plain = _run(saved, "ab", "-", *options, input="longer\n")
    assert plain.stdout == "".join(row["prompt"] + row["text"] + "\n" for row in rows)


def test_colors_on_a_terminal(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = storyteller(data_dir)
    bayesify(model, members=2, init_scale=0.1).save_pretrained(tmp_path)  # the tokenizer is the base model's
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    result = _run(tmp_path, "Once upon a time", "--max-new-tokens", 12, "--doubt", "mutual-information")
    assert result.exit_code == 0, result.output
    monkeypatch.delenv("FORCE_COLOR")
    plain = _run(tmp_path, "Once upon a time", "--max-new-tokens", 12).stdout
    assert "\x1b[" in result.stdout
    shown = re.sub(r"\x1b\[[\d;]*m", "", result.stdout)
    assert shown.startswith(plain)
    assert "mutual information in nats, up to" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["ab", "--max-new-tokens", 100], "more than the 64 positions"),
        ([""], "all prompts are empty"),
        (["ab", "--top-p", 0.5], "--temperature"),
        (["ab", "--max-new-tokens", 9, "--samples", 0], "samples must be at least 1"),
    ],
)
def test_errors(saved: Path, arguments: list[object], named: str) -> None:
    result = _run(saved, *arguments)
    assert result.exit_code == 1
    assert named in result.stderr


def test_other_models_are_refused(tmp_path: Path) -> None:
    result = _run(tmp_path, "ab")
    assert result.exit_code == 1
    assert "expected a folder written by save_pretrained" in result.stderr
    untold = bayesify(writer("gpt2"), members=2)
    untold.save_pretrained(tmp_path)
    result = _run(tmp_path, "ab")
    assert "has no tokenizer" in result.stderr


def test_blank_lines_are_no_prompts(saved: Path) -> None:
    options = ["--max-new-tokens", 2, "--json"]
    found, expected = (
        json.loads(_run(saved, "-", *options, input=text).stdout) for text in ("ab\n\n \nc\n", "ab\nc\n")
    )
    assert found == expected
    assert len(found) == 2
    for text in ("", "\n \n"):
        result = _run(saved, "-", *options, input=text)
        assert (result.exit_code, result.stderr) == (
            1,
            "Error: there is nothing to go on from: all prompts are empty.\n",
        )
