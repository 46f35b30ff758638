"""Images of a data set, corrupted before the model's preprocessing sees them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Subset
from torch.utils.data import Dataset as TorchDataset

from bayesify.data import PreparedDataset
from bayesify.data.seeding import seed_of, seeded
from bayesify.data.transforms import to_channels
from bayesify.errors import BayesifyError, ConfigError, DataError
from bayesify.evaluation.corruption_cache import EncodedImages, StoredImages, fingerprint, write_images
from bayesify.evaluation.imagecorruptions_compat import corrupt, versions
from bayesify.evaluation.stages import Stages

if TYPE_CHECKING:
    from PIL.Image import Image

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)
CLEAN = "clean"
SMALLEST = 32


class CorruptionSet(NamedTuple):
    """Labeled batches (see `collect`) of one corruption and severity; severity 0 is the data as they are."""

    corruption: str
    severity: int
    batches: Iterable[Any]


def corruption_sets(
    prepared: PreparedDataset,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    *,
    seed: int = 0,
    batch_size: int = 32,
    workers: int = 0,
    cache: str | Path | None = None,
    limit: int | None = None,
) -> list[CorruptionSet]:
    """The rows as they are, then under each corruption and severity. Images are corrupted when batches are read.

    Args:
        prepared: images, prepared without augmentation.
        corruptions: names among `CORRUPTIONS`; None is all 15.
        severities: among 1 to 5.
        seed: a row's corruption is a function of (seed, corruption, severity, row): alike in any order and process.
        batch_size: examples of one forward pass.
        workers: processes that corrupt and load.
        cache: folder for the corrupted images, one file a set, which spares corrupting them again. A file is used
            for the same images, preprocessing, seed and versions of the libraries only.
        limit: number of rows, evenly spaced; None is all.

    Raises:
        ConfigError: a name or number without meaning, data prepared for training, or `imagecorruptions` is missing.
        DataError: the data are no images.
    """
    return CorruptionPlan(prepared, corruptions, severities, seed, limit).sets(batch_size, workers, cache)


class CorruptionPlan:
    """What `corruption_sets` is to make: its arguments, checked, and the rows."""

    def __init__(
        self,
        prepared: PreparedDataset,
        corruptions: Sequence[str] | None,
        severities: Sequence[int],
        seed: int,
        limit: int | None,
    ) -> None:
        self.corruptions = _check_names(corruptions)
        self.severities = _check_severities(severities)
        if prepared.preprocessing.kind != "image":
            raise DataError(f"corruptions are for images; the data set holds {prepared.preprocessing.kind}s.")
        if prepared.training:
            raise ConfigError(
                "the data are prepared for training, with augmentation; prepare them with training=False."
            )
        self.versions = versions()  # fails here, not in a worker
        self.prepared, self.seed = prepared, seed
        self.rows = _rows(len(prepared), limit)

    @cached_property
    def fingerprint(self) -> str:
        """Of all images, which are read for it."""
        return fingerprint(self.prepared, self.rows, self.seed)

    def sets(self, batch_size: int, workers: int, cache: str | Path | None) -> list[CorruptionSet]:
        if batch_size < 1 or workers < 0:
            raise ConfigError(f"expected batch_size ≥ 1 and workers ≥ 0; found {batch_size} and {workers}.")
        prepared, seed, rows = self.prepared, self.seed, self.rows
        stages = Stages.of(prepared.preprocessing)
        loading = _Loading(prepared, batch_size, workers, seed)
        sets = [CorruptionSet(CLEAN, 0, loading.loader(Subset(prepared, rows)))]
        for corruption in self.corruptions:
            for severity in self.severities:
                images = CorruptedImages(prepared, corruption, severity, seed=seed, rows=rows, stages=stages)
                path = None
                if cache is not None:
                    path = Path(cache) / f"{corruption}-{severity}-{self.fingerprint[:16]}.arrow"
                sets.append(CorruptionSet(corruption, severity, _Batches(images, loading, path)))
        return sets


class CorruptedImages(TorchDataset):
    """Rows of `prepared` under one corruption; item i is (input, label or None) of row `rows[i]`.

    The corruption acts on the image itself or on what the model's own resizing and cropping leave of it, whichever
    has fewer pixels; what is left of the preprocessing follows. So images of 32×32 are corrupted as they are, and
    photographs at the input size of the model. CIFAR-10-C and ImageNet-C were made at these sizes, too. (CIFAR-10-C
    has milder constants than the package, which holds those of ImageNet-C: its numbers do not compare with these.)

    Args:
        prepared: images, prepared without augmentation.
        corruption, severity: one of `CORRUPTIONS`, 1 to 5.
        seed: the corruption of a row is a function of (seed, corruption, severity, row).
        rows: which rows, in this order; None is all.
        stages: the preprocessing in two parts, if already at hand.
    """

    def __init__(
        self,
        prepared: PreparedDataset,
        corruption: str,
        severity: int,
        *,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        stages: Stages | None = None,
    ) -> None:
        (self.corruption,) = _check_names([corruption])
        (self.severity,) = _check_severities([severity])
        self.prepared = prepared
        self.seed = seed
        self.rows = list(range(len(prepared)) if rows is None else rows)
        self.stages = stages or Stages.of(prepared.preprocessing)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int | None]:
        return self.finish(index, *self.image(index))

    def image(self, index: int) -> tuple[Image, bool]:
        """The corrupted image (RGB), and whether it is already resized and cropped.

        Raises:
            DataError: the image cannot be read or is smaller than 32×32.
        """
        row, column = self.rows[index], self.prepared.input_column
        try:
            value = self.prepared.dataset[row][column]
            if value is None:
                raise DataError("the value is missing")
            image, cropped = self.stages.smaller(to_channels(value, 3))
            if min(image.size) < SMALLEST:
                place = " after the model's resizing and cropping" if cropped else ""
                raise DataError(
                    f"corruptions need {SMALLEST}×{SMALLEST} pixels or more; found {image.width}×{image.height}{place}"
                )
            with seeded(self.seed, self.corruption, self.severity, row):
                return corrupt(image, self.corruption, self.severity), cropped
        except Exception as error:  # decoders raise whatever the broken bytes lead to
            reason = str(error) if isinstance(error, BayesifyError) else f"{type(error).__name__}: {error}"
            raise DataError(f"row {row}: column {column!r} cannot be corrupted: {reason}") from error

    def finish(self, index: int, image: Image, cropped: bool) -> tuple[Any, int | None]:
        """The input made of a corrupted image, and the label."""
        labels = self.prepared.labels
        return self.stages.finish(image, cropped), None if labels is None else labels[self.rows[index]]


class _Loading(NamedTuple):
    """How batches are loaded."""

    prepared: PreparedDataset
    batch_size: int
    workers: int
    seed: int

    def loader(self, dataset: Any, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.workers,
            worker_init_fn=_one_thread,
            generator=torch.Generator().manual_seed(seed_of(self.seed, "workers")),
            **{"collate_fn": self.prepared.collate_fn, **options},
        )


class _Batches:
    """Batches of corrupted images, through the file `path` if one is given; it is written when first read."""

    def __init__(self, images: CorruptedImages, loading: _Loading, path: Path | None) -> None:
        self.images, self.loading, self.path = images, loading, path

    def __len__(self) -> int:
        return -(-len(self.images) // self.loading.batch_size)

    def __iter__(self) -> Iterator[Any]:
        dataset: Any = self.images
        if self.path is not None:
            if not self.path.is_file():
                encoded = self.loading.loader(EncodedImages(self.images), collate_fn=list)
                write_images(self.path, encoded)
            dataset = StoredImages(self.images, self.path)
        return iter(self.loading.loader(dataset))


def _one_thread(worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)  # OpenCV's threads do not survive a fork


def _rows(total: int, limit: int | None) -> list[int]:
    """`limit` evenly spaced rows: the first ones of a sorted data set would all be of one class."""
    if limit is None or limit >= total:
        return list(range(total))
    if limit < 1:
        raise ConfigError(f"limit must be a positive number of rows; found {limit}.")
    return [index * total // limit for index in range(limit)]


def _check_names(corruptions: Sequence[str] | None) -> tuple[str, ...]:
    """Names among `CORRUPTIONS`, each once; None is all. Raises `ConfigError` with the nearest name."""
    if corruptions is None:
        return CORRUPTIONS
    if isinstance(corruptions, str) or not corruptions:
        raise ConfigError(f"corruptions must be a list of one or more names; found {corruptions!r}.")
    for name in corruptions:
        if name not in CORRUPTIONS:
            near = difflib.get_close_matches(str(name), CORRUPTIONS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"corruption {name!r} is unknown; known: {', '.join(CORRUPTIONS)}.{hint}")
    return tuple(dict.fromkeys(corruptions))


def _check_severities(severities: Sequence[int]) -> tuple[int, ...]:
    """Severities among 1 to 5, each once. Raises `ConfigError`."""
    wrong = [value for value in severities if type(value) is not int or value not in SEVERITIES]
    if wrong or not severities:
        raise ConfigError(f"severities must be whole numbers from 1 to 5; found {list(severities)}.")
    return tuple(dict.fromkeys(severities))
