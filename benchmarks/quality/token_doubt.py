"""Does a language model doubt what makes no sense? Stories against the same words shuffled, and against Shakespeare.

    python benchmarks/quality/token_doubt.py     # about twelve minutes on one core, then the table

The doubt of a passage is the mean over its tokens. AUROC: how often a passage of the other text is doubted more than a
story. The model is the small Llama of stories in $BAYESIFY_DATA.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from results import cell, summary, write_table
from rich.console import Console
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from bayesify import ELBO, BayesianModel, Predictive, bayesify

TOKENS, PASSAGES, WORDS = 64, 200, 64
"""Tokens of a passage, passages of each kind, and words from which the tokens are taken."""

MEASURES = ("NLL", "shuffled, entropy", "shuffled, MI", "Shakespeare, entropy", "Shakespeare, MI")
Predict = Callable[[Tensor], Predictive]


def main(
    data: Annotated[Path | None, typer.Option(help="Folder of the data; the default is $BAYESIFY_DATA.")] = None,
    output: Annotated[Path, typer.Option(help="Where the table goes.")] = Path(__file__).parent / "results/token_doubt",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, … of words, factors and batches.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of fine-tuning.")] = 300,
    members: Annotated[int, typer.Option(min=1)] = 4,
) -> None:
    logging.disable_progress_bar()
    folder = data or Path(os.environ["BAYESIFY_DATA"])
    found: dict[str, list[dict[str, float | None]]] = {}
    for seed in range(seeds):
        for name, values in _run(folder, seed, steps, members).items():
            found.setdefault(name, []).append(values)
    table = {name: {m: summary([run[m] for run in runs]) for m in MEASURES} for name, runs in found.items()}
    rows = [[name, *(cell(values[measure], 3) for measure in MEASURES)] for name, values in table.items()]
    settings = {"seeds": seeds, "steps": steps, "members": members, "passages": PASSAGES, "tokens": TOKENS}
    content = {"settings": settings, "table": table, "runs": found}
    write_table(output, "Doubt of tokens", ["model", *MEASURES], rows, content, Console(width=140))


def _run(folder: Path, seed: int, steps: int, members: int) -> dict[str, dict[str, float | None]]:
    """What each model makes of the passages of one seed."""
    checkpoint = folder / "checkpoints" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rng = random.Random(seed)
    stories = _passages(folder / "text" / "tinystories_sample.txt")
    plays = rng.sample(_passages(folder / "text" / "tinyshakespeare.txt"), PASSAGES)
    train, test = stories[:-PASSAGES], stories[-PASSAGES:]
    shuffled = [rng.sample(words, len(words)) for words in test]
    texts = [_encode(tokenizer, passages) for passages in (test, shuffled, plays)]
    examples = _encode(tokenizer, train)

    def fresh() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(checkpoint)

    def bayesian() -> BayesianModel:
        torch.manual_seed(seed)
        return bayesify(fresh(), members=members, init="normal", init_scale=0.1)

    name = f"{members} members"
    plain, trained = fresh(), bayesian()
    found = {"plain": _measure(_plain(plain), texts), f"{name}, as converted": _measure(trained.predict, texts)}
    _finetune(plain, examples, steps, seed)
    _finetune(trained, examples, steps, seed)
    found["plain, fine-tuned"] = _measure(_plain(plain), texts)
    found[f"{name}, fine-tuned"] = _measure(trained.predict, texts)
    return found


def _passages(path: Path) -> list[list[str]]:
    words = path.read_text(encoding="utf-8").split()
    return [words[start : start + WORDS] for start in range(0, len(words) - WORDS, WORDS)]


def _encode(tokenizer: Any, passages: list[list[str]]) -> Tensor:
    """[passages, TOKENS], each with the start token."""
    return torch.tensor([tokenizer(" ".join(words))["input_ids"][:TOKENS] for words in passages])


def _plain(model: nn.Module) -> Predict:
    return lambda tokens: Predictive(model(tokens).logits[None, None])


def _finetune(model: Any, examples: Tensor, steps: int, seed: int, size: int = 16) -> None:
    """AdamW with a cosine: all weights of a plain model at 3e-4, only the factors of a Bayesian one at 3e-3."""
    torch.manual_seed(seed)
    rank1 = isinstance(model, BayesianModel)
    if rank1:
        for _, parameter in model.slow_parameters():
            parameter.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3 if rank1 else 3e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    elbo = ELBO(model, len(examples)) if rank1 else None
    model.train()
    for step in range(steps):
        batch = examples[torch.randint(len(examples), (size,))]
        output = model(input_ids=batch, labels=batch)
        loss = output.loss if elbo is None else elbo(output, step=step, values=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def _measure(predict: Predict, texts: list[Tensor]) -> dict[str, float | None]:
    """NLL of a story's token (nats), and AUROC of both measures of doubt for each other kind of text."""
    nll, doubts = 0.0, []
    for kind, tokens in enumerate(texts):
        parts = []
        for batch in tokens.split(25):
            predictive = predict(batch)
            if kind == 0:
                log_probs = predictive.log_probs[:, :-1].gather(-1, batch[:, 1:, None])
                nll -= float(log_probs.mean()) * len(batch) / len(tokens)
            values = predictive.entropy, predictive.mutual_information
            parts.append(torch.stack([value[:, :-1].mean(1) for value in values]))
        doubts.append(torch.cat(parts, 1))
    stories, *others = doubts
    found: dict[str, float | None] = {"NLL": nll}
    for name, other in zip(("shuffled", "Shakespeare"), others, strict=True):
        for measure, inside, outside in zip(("entropy", "MI"), stories, other, strict=True):
            target = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).int()
            known = bool(outside.max() > 1e-5)  # one network agrees with itself
            score = torch.cat([inside, outside])
            # Ranks: the metric takes values outside of [0, 1] for logits.
            auroc = float(binary_auroc(score.argsort().argsort() / len(score), target)) if known else None
            found[f"{name}, {measure}"] = auroc
    return found


if __name__ == "__main__":
    typer.run(main)
