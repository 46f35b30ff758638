"""Photographs, from an ImageNet network; and small images, from a CIFAR-10 classifier."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify import FineTuneConfig
from tasks.task import CACHE, DATA, Task, batches_of

sys.path.extend(str(Path(__file__).parents[3] / "integrations" / name) for name in ("cifar", "solar_cells"))
from data import Images
from demo import write_base

INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the images: EfficientNet-Lite0 takes the former, the CIFAR ResNets the latter."""
CORRUPTIONS = ("gaussian_noise", "defocus_blur", "brightness", "contrast", "jpeg_compression")
"""One of each family, and contrast."""
SEVERITIES = (1, 2, 3, 4, 5)


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
        model = load_base(folder, label_names=[str(number) for number in range(classes)]).model
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

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
        name=name,
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
        40,
        {"solar cells": (cells[:300], classes[:300]), "CIFAR-100": pictures("cifar100/test-*.parquet", size, 300)},
        network=lite0(5),
        tuning=FineTuneConfig(freeze_batch_norm=True, steps=150, batch_size=16, eval_every=50),
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
        40,
        {
            "flowers": pictures("flowers/test-*.parquet", size),
            "CIFAR-100": pictures("cifar100/test-*.parquet", size, 300),
        },
        network=lite0(4),
        tuning=FineTuneConfig(freeze_batch_norm=True, steps=200, batch_size=16, eval_every=50),
        head="classifier",
        dropout=LITE0_DROPOUT,
    )


def cifar10() -> Task:
    """Ten classes at 64 pixels: 29,000 images of which the steps see a part, 1,000 to validate, 2,000 to test."""
    small, labels = pictures("cifar10/train-*.parquet", 32)
    tiny, truth = pictures("cifar10/test-*.parquet", 32, 2000)
    distant, other = pictures("cifar100/test-*.parquet", 32, 1000)
    large = [_larger(part) for part in (small, tiny, distant)]
    return _image_task(
        "cifar10",
        (large[0][:-1000], labels[:-1000]),
        (large[0][-1000:], labels[-1000:]),
        (large[1], truth),
        60,
        {"CIFAR-100": (large[2], other)},
        network=lite0(10),
        tuning=FineTuneConfig(freeze_batch_norm=True, steps=300, batch_size=32, eval_every=100),
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


def _cifar_resnet(layers: int, seed: int) -> nn.Module:
    from safetensors.torch import load_file

    network = CifarResNet((layers - 2) // 6)
    network.load_state_dict(load_file(DATA / "checkpoints" / f"cifar10_resnet{layers}.safetensors"))
    return network.eval()


def resnet20() -> Task:
    return _cifar_task(20)


def resnet56() -> Task:
    return _cifar_task(56)


def _cifar_task(layers: int) -> Task:
    """A trained classifier goes on with 4,000 images of the test set; 1,000 validate, the other 5,000 test."""
    images, labels = pictures("cifar10/test-*.parquet", 32)
    return _image_task(
        f"resnet{layers}",
        (images[:4000], labels[:4000]),
        (images[4000:5000], labels[4000:5000]),
        (images[5000:], labels[5000:]),
        100,
        {"CIFAR-100": pictures("cifar100/test-*.parquet", 32, 1000)},
        scaling=IMAGENET,
        network=partial(_cifar_resnet, layers),
        tuning=FineTuneConfig(freeze_batch_norm=True, steps=250, batch_size=32, eval_every=50),
        head="linear",
        dropout=("layer2", "layer3", "linear"),
        new_head=False,
    )
