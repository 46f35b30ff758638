"""`bayesify generate`: text, with every token colored by how sure the model was of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayesify.cli.models import device_of
from bayesify.cli.options import AsJson, BatchSize, Device, DrawSeed, Samples, TrustRemoteCode
from bayesify.errors import DataError, FormatError

if TYPE_CHECKING:
    from rich.text import Text

    from bayesify.generation import Generation
    from bayesify.model import BayesianModel

_HEAT = ("", "black on #fff3b0", "black on #ffd166", "black on #f79256", "white on #d62828")
"""Styles of five equal steps from no doubt to the most in what is shown."""


class DoubtName(str, Enum):
    ENTROPY = "entropy"
    MUTUAL_INFORMATION = "mutual-information"


def generate(
    model: Annotated[
        str,
        typer.Argument(help="A saved Bayesian language model (folder or Hub id).", show_default=False),
    ],
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT...", help="Texts to go on from, or - for one a line of standard input.", show_default=False
        ),
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the new text at most.")] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Draw tokens, at this temperature; the default is the most probable.", show_default=False
        ),
    ] = None,
    top_p: Annotated[
        float,
        typer.Option(min=0.01, max=1.0, help="Draw from the fewest tokens that have this probability together."),
    ] = 1.0,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams of beam search; 1 is none.")] = 1,
    samples: Samples = None,
    doubt: Annotated[DoubtName, typer.Option(help="What the colors show.")] = DoubtName.ENTROPY,
    as_json: AsJson = False,
    batch_size: BatchSize = 8,
    seed: DrawSeed = 0,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write on from prompts, every member taking part in every token.

    Entropy is all of the doubt, mutual information the part on which the members disagree; both in nats.
    """
    import torch

    from bayesify.hub import load_bayesian

    where = device_of(device)
    given = (line for prompt in prompts for line in (sys.stdin.read().splitlines() if prompt == "-" else [prompt]))
    texts = [text for text in given if text.strip()]
    if not texts:
        raise DataError("there is nothing to go on from: all prompts are empty.")
    network = load_bayesian(model, trust_remote_code=trust_remote_code)
    goes_on = not getattr(network.model.config, "is_encoder_decoder", False)
    tokenizer = _tokenizer(network, model, goes_on)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "samples": samples,
        "seed": seed,
        "do_sample": temperature is not None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if temperature is not None:
        options |= {"temperature": temperature, "top_p": top_p}
    elif top_p != 1.0:
        raise DataError("--top-p is for drawing tokens; give --temperature, too.")
    network.to(where)
    torch.manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(texts), batch_size):
        some = texts[start : start + batch_size]
        inputs = tokenizer(some, return_tensors="pt", padding=True).to(where)
        if goes_on:
            _check_length(network, inputs["input_ids"].shape[1], max_new_tokens)
        rows += _rows(some, network.generate(**inputs, **options), tokenizer)
    _show(rows, doubt.value.replace("-", "_"), as_json, goes_on)


def _tokenizer(network: BayesianModel, name: str, goes_on: bool) -> Any:
    """The tokenizer that was saved with the model, or its base model's; pads on the left of texts that go on."""
    from bayesify.data import TextPreprocessing
    from bayesify.data.preprocessing import load_tokenizer

    if isinstance(network.preprocessing, TextPreprocessing):
        tokenizer = network.preprocessing.tokenizer
    elif network.preprocessing is None and network.origin is not None and network.origin.id is not None:
        tokenizer = load_tokenizer(network.origin.id, network.origin.revision)
    else:
        raise FormatError(f"{name} has no tokenizer; set .preprocessing to a TextPreprocessing in Python and save it.")
    tokenizer.padding_side = "left" if goes_on else "right"
    return tokenizer


def _check_length(network: BayesianModel, prompt: int, new: int) -> None:
    limit = getattr(network.model.config, "max_position_embeddings", None)
    if prompt == 0:
        raise DataError("a prompt is empty; give at least a word to go on from.")
    if isinstance(limit, int) and prompt + new > limit:
        raise DataError(
            f"a prompt of {prompt} tokens and --max-new-tokens {new} are more than the {limit} positions of this "
            f"model; give --max-new-tokens {max(limit - prompt, 0)} or less."
        )


def _rows(texts: Sequence[str], found: Generation, tokenizer: Any) -> list[dict[str, Any]]:
    """What is printed as JSON: prompt, text, and [{text, entropy, mutual_information}] of its tokens."""
    from bayesify.generation.pieces import pieces

    assert found.sequences is not None
    assert found.entropy is not None
    assert found.mutual_information is not None
    before = found.sequences.shape[1] - found.entropy.shape[1]
    rows = []
    for text, ids, *doubts in zip(texts, found.sequences, found.entropy, found.mutual_information, strict=True):
        length = int(doubts[0].isfinite().sum())
        tokens = pieces(tokenizer, ids[:before].tolist(), ids[before : before + length].tolist())
        values = zip(tokens, *(doubt[:length].tolist() for doubt in doubts), strict=True)
        told = [{"text": token, "entropy": entropy, "mutual_information": mi} for token, entropy, mi in values]
        rows.append({"prompt": text, "text": "".join(tokens), "tokens": told})
    return rows


def _show(rows: Sequence[dict[str, Any]], doubt: str, as_json: bool, goes_on: bool) -> None:
    from rich.console import Console

    console = Console()
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    elif console.is_terminal:
        most = max((token[doubt] for row in rows for token in row["tokens"]), default=0.0)
        for row in rows:
            console.print(_colored(row, doubt, most, goes_on))
        console.print(_legend(doubt, most))
    else:
        for row in rows:
            typer.echo((row["prompt"] if goes_on else "") + row["text"])


def _colored(row: dict[str, Any], doubt: str, most: float, goes_on: bool) -> Text:
    from rich.text import Text

    text = Text(row["prompt"] if goes_on else "", style="bold")
    for token in row["tokens"]:
        step = min(int(token[doubt] / most * len(_HEAT)), len(_HEAT) - 1) if most > 0 else 0
        text.append(token["text"], style=f"not bold {_HEAT[step]}".strip())
    return text


def _legend(doubt: str, most: float) -> Text:
    from rich.text import Text

    text = Text(f"\n{doubt.replace('_', ' ')} in nats, up to ")
    for step, style in enumerate(_HEAT, 1):
        text.append(f" {most * step / len(_HEAT):.2f} ", style=style)
    return text
