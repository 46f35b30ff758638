"""`bayesify predict`: classes of single images or texts, with how sure the model is."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayesify.cli.models import check_draws, device_of, load_with_inputs
from bayesify.cli.options import AnyModel, AsJson, BatchSize, Device, DrawSeed, MemberChunk, Samples, TrustRemoteCode
from bayesify.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

    from bayesify.data import Preprocessing
    from bayesify.predictive import Predictive


def predict(
    model: AnyModel,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Image files or folders of them; or texts, .txt files with a text per line, or - for standard input. "
            "A pair of texts has a tab between.",
            show_default=False,
        ),
    ],
    samples: Samples = None,
    member_chunk: MemberChunk = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show of each input.")] = 3,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Show a set of classes that holds the true one with probability 1 − alpha, of a model from `bayesify "
            "calibrate`.",
            show_default=False,
        ),
    ] = None,
    sort_uncertain: Annotated[
        bool, typer.Option("--sort-uncertain", help="Most uncertain first (by entropy).", show_default=False)
    ] = False,
    as_json: AsJson = False,
    as_text: Annotated[
        bool,
        typer.Option("--text", help="Read every INPUT as a text, even if a file has that name.", show_default=False),
    ] = False,
    batch_size: BatchSize = 32,
    seed: DrawSeed = 0,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Predict the classes of images or texts.

    Entropy is all of the doubt, mutual information the part on which the members disagree; both in nats.
    """
    from rich.console import Console

    from bayesify.evaluation import collect

    where = device_of(device)
    network, preprocessing, classes = load_with_inputs(model, trust_remote_code)
    check_draws(network, model, samples, member_chunk)
    if preprocessing.kind == "text":
        names = _texts(inputs, as_text)
    elif as_text:
        raise DataError(f"{model} takes images; --text is for models of texts.")
    else:
        names = _images(inputs)
    if not names:
        raise DataError("there is nothing to predict: the inputs are empty.")
    batches = _batches(names, preprocessing, batch_size)
    predictive, _ = collect(
        network.to(where), batches, samples=samples, member_chunk=member_chunk, seed=seed, progress=False
    )
    rows = _rows(names, predictive, classes, top, alpha)
    if sort_uncertain:
        rows.sort(key=lambda row: -row.get("entropy", sum(row.get("variance", []))))
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        Console().print(_table(rows))


def _texts(inputs: Sequence[str], as_text: bool) -> list[str]:
    texts: list[str] = []
    for value in inputs:
        if as_text or (value != "-" and not value.endswith(".txt")):
            texts.append(value)
        elif value == "-":
            texts += sys.stdin.read().splitlines()
        else:
            try:
                texts += Path(value).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{value} cannot be read as a text file: {error}") from error
    return [text for text in texts if text.strip()]


def _images(inputs: Sequence[str]) -> list[str]:
    from bayesify.data.files import IMAGE_SUFFIXES

    images: list[str] = []
    for value in inputs:
        path = Path(value).expanduser()
        if path.is_dir():
            found = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise DataError(f"{value} holds no image.")
            images += found
        elif path.is_file():
            images.append(value)
        else:
            raise DataError(f"{value} is neither an image file nor a folder.")
    return images


def _batches(names: Sequence[str], preprocessing: Preprocessing, size: int) -> Iterator[Any]:
    from bayesify.data import TextPreprocessing

    if isinstance(preprocessing, TextPreprocessing):
        items = (_tokens(text, preprocessing) for text in names)
    else:
        transform = preprocessing.eval_transform()
        items = (_pixels(name, transform) for name in names)
    for start in range(0, len(names), size):
        yield preprocessing.collate([next(items) for _ in range(start, min(start + size, len(names)))], None)


def _tokens(text: str, preprocessing: Any) -> Any:
    if not preprocessing.pair:
        return preprocessing(text)
    first, tab, second = text.partition("\t")
    if not tab:
        raise DataError(f"the model takes pairs of texts with a tab between; found {text!r}.")
    return preprocessing(first, second)


def _pixels(name: str, transform: Any) -> Any:
    from PIL import Image

    try:
        with Image.open(Path(name).expanduser()) as image:
            return transform(image)
    except Exception as error:  # decoders raise whatever the broken bytes lead to
        raise DataError(f"{name} cannot be read as an image: {error}") from error


def _rows(
    names: Sequence[str], predictive: Predictive, classes: Sequence[str], top: int, alpha: float | None
) -> list[dict[str, Any]]:
    sets = None if alpha is None else predictive.sets(alpha)
    if not predictive.has_classes:
        pairs = zip(predictive.mean.flatten(1).tolist(), predictive.variance.flatten(1).tolist(), strict=True)
        return [{"input": n, "mean": m, "variance": v} for n, (m, v) in zip(names, pairs, strict=True)]
    if predictive.probs.dim() > 2:
        raise DataError(
            f"this model answers in {math.prod(predictive.probs.shape[1:-1])} places of each input, and a table shows "
            "one answer; use `predict` of the Python library."
        )
    probs, order = predictive.probs.topk(min(top, predictive.probs.shape[-1]))
    # Of several labels: the sum over them.
    entropy, mutual = (
        v.view(len(names), -1).sum(-1).tolist() for v in (predictive.entropy, predictive.mutual_information)
    )

    def called(number: int) -> str:
        return classes[number] if number < len(classes) else str(number)

    rows = []
    for number, name in enumerate(names):
        best = zip(order[number].tolist(), probs[number].tolist(), strict=True)
        found = [{"class": called(c), "probability": p} for c, p in best]
        row = {"input": name, "classes": found, "entropy": entropy[number], "mutual_information": mutual[number]}
        if sets is not None:
            row["set"] = [called(c) for c in sets[number].nonzero().flatten().tolist()]
        rows.append(row)
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("input", overflow="fold")
    if "mean" in rows[0]:
        for title in ("mean", "variance"):
            table.add_column(title, justify="right")
        for row in rows:
            values = (", ".join(f"{value:.4g}" for value in row[title]) for title in ("mean", "variance"))
            table.add_row(Text(row["input"]), *values)
        return table
    for title, justify in (("class", "left"), ("probability", "right")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for title in ("entropy (nats)", "mutual information (nats)"):
        table.add_column(title, justify="right")
    if "set" in rows[0]:
        table.add_column("set", overflow="fold")
    for row in rows:
        table.add_row(
            Text(row["input"]),
            Text("\n".join(found["class"] for found in row["classes"])),
            "\n".join(f"{found['probability']:.4f}" for found in row["classes"]),
            f"{row['entropy']:.4f}",
            f"{row['mutual_information']:.4f}",
            *([Text(", ".join(row["set"]))] if "set" in row else []),
        )
    return table
