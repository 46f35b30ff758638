"""ImageNet and ImageNet-C as folders of images, one folder a class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from torch.utils.data import DataLoader

from bayesify.data import ImagePreprocessing, PreparedDataset, make_loader
from bayesify.data.files import IMAGE_SUFFIXES
from bayesify.data.transforms import TimmTransform
from bayesify.errors import DataError
from bayesify.evaluation import CORRUPTIONS, SEVERITIES


class RandomCrops(ImagePreprocessing):
    """Training sees from 8 % of an image's area on, as published, and flips; `ImagePreprocessing` crops less."""

    def train_transform(self, color_jitter: float = 0.0) -> TimmTransform:
        from timm.data import create_transform

        options = {"scale": (0.08, 1.0), "color_jitter": color_jitter or None, **self._options()}
        return TimmTransform(create_transform(is_training=True, **options), self.input_size[0])


def class_names(root: Path) -> list[str]:
    """The names of the folders in `root`, sorted: for ImageNet's wnids the order of pretrained networks."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; expected one folder a class in it.")
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{root} holds no folders; expected one a class.")
    return names


def read_folder(root: Path, classes: Sequence[str]) -> Dataset:
    """Rows (image, label) of the files root/<class>/*, sorted. Only names are read here, images when a row is.

    (`load_data` also reads such folders, but looks at every file: 0.5 ms each, at every start.)

    Raises:
        DataError: there is no image, or a folder is none of the classes.
    """
    codes = {name: code for code, name in enumerate(classes)}
    paths: list[str] = []
    labels: list[int] = []
    for name in class_names(root):
        if name not in codes:
            raise DataError(f"{root / name}: not one of the {len(classes)} classes, which are the folders of train.")
        found = sorted(e.path for e in os.scandir(root / name) if e.name.lower().endswith(IMAGE_SUFFIXES))
        paths += found
        labels += [codes[name]] * len(found)
    if not paths:
        raise DataError(f"{root} holds no images; expected {root}/<class>/*.JPEG.")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(classes))})
    return Dataset.from_dict({"image": paths, "label": labels}, features=features)


def prepare_folder(dataset: Dataset, preprocessing: ImagePreprocessing, **options: Any) -> PreparedDataset:
    """Rows of `read_folder` as a model takes them."""
    classes = len(dataset.features["label"].names)
    return PreparedDataset(dataset, preprocessing, "image", "label", num_classes=classes, **options)


def imagenet_c(
    root: Path, classes: Sequence[str], preprocessing: ImagePreprocessing, batch_size: int, workers: int = 0
) -> Iterator[tuple[str, int, DataLoader]]:
    """(corruption, severity, batches) of each folder root/<corruption>/<severity>/<class> there is, among the usual 15.

    The images of ImageNet-C are crops already: give a preprocessing that does not crop again.

    Raises:
        DataError: there is no such folder.
    """
    found = [(name, level) for name in CORRUPTIONS for level in SEVERITIES if (root / name / str(level)).is_dir()]
    if not found:
        raise DataError(f"{root} is not ImageNet-C; expected {root}/<corruption>/<severity>/<class>/*.JPEG.")
    return (
        (
            name,
            level,
            make_loader(
                prepare_folder(read_folder(root / name / str(level), classes), preprocessing),
                batch_size,
                workers=workers,
            ),
        )
        for name, level in found
    )
