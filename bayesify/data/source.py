"""`load_data`: a data set from the Hub, a folder of images, or Parquet, CSV and JSON files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayesify.data.columns import Kind, check_column, encode_labels, find_input, find_label, is_image, is_text
from bayesify.data.files import canonical_split, image_files, is_saved_dataset, table_files
from bayesify.data.splits import Splits
from bayesify.errors import BayesifyError, ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

_SPLIT = re.compile(r"(?P<name>[^\[\]]+)(?P<slice>\[.*\])?")


def load_data(
    dataset: str | Path,
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    labels: bool = True,
) -> Splits:
    """Load a data set, find its columns and encode its labels.

    Args:
        dataset: a Hub id; a folder of images (one sub-folder per class; train/validation/test above them or
            not);
            a Parquet, CSV or JSON(L) file, a folder of them or a glob; or a folder written by `save_to_disk`.
            Files go to splits by name: `train-00000-of-00003.parquet` is a part of train, `valid.csv` is
            validation, `oos_test.csv` beside `test.csv` a split of its own.
        image_column, text_column, text_pair_column, label_column: found by themselves where not given. The
            label column is the one called label, labels, target or class, or the only `ClassLabel`.
        split: keep this split only, or a part of it, e.g. `"test[:200]"`. Labels are still encoded over all.
        subset: the configuration of a Hub data set, e.g. `"mrpc"` of GLUE.
        revision: branch, tag or commit of a Hub data set.
        labels: False leaves labels unread, whatever they are.

    Raises:
        DataError: nothing can be read there, or a column or split does not exist or has no meaning.
        ConfigError: both an image and a text column are given, or a subset or revision of what is on disk.
    """
    if image_column is not None and (text_column is not None or text_pair_column is not None):
        raise ConfigError("give image_column or text_column, not both.")
    found = {name: data for name, data in _read(dataset, subset, revision).items() if len(data) > 0}
    usual = [name for name in ("train", "validation", "test") if name in found]
    splits = {name: found[name] for name in [*usual, *found]}
    if not splits:
        raise DataError(f"{dataset} holds no example.")
    given = {
        "image_column": image_column,
        "text_column": text_column,
        "text_pair_column": text_pair_column,
        "label_column": label_column,
    }
    for option, column in given.items():
        if column is not None:
            check_column(splits, column, option)

    label = label_column or find_label(splits)
    kind: Kind = "image" if image_column else "text"
    column, pair = image_column or text_column, text_pair_column
    if column is None:
        kind, column, found_pair = find_input(splits, label)
        pair = pair or found_pair
    if column == label:
        raise DataError(f"column {column!r} cannot be both input and label; name the other one.")
    splits = {name: _as_input(data, name, kind, [column, pair]) for name, data in splits.items()}
    label_names: list[str] = []
    if label is not None and labels:
        splits, label_names = encode_labels(splits, label)
    if split is not None:
        splits = _only(splits, split)
    return Splits(
        kind,
        column,
        label if label_names else None,
        label_names,
        pair,
        train=splits.pop("train", None),
        validation=splits.pop("validation", None),
        test=splits.pop("test", None),
        others=splits,
    )


def _read(dataset: str | Path, subset: str | None, revision: str | None) -> dict[str, Dataset]:
    import datasets

    path = Path(dataset).expanduser()
    local = path.exists() or re.search(r"[*?\[]", str(dataset))
    for option, value in (("subset", subset), ("revision", revision)):
        if local and value is not None:
            raise ConfigError(f"{option}={value!r} is for data sets on the Hub; {dataset} is on disk and has none.")
    try:
        if path.is_dir() and is_saved_dataset(path):
            return _by_name(datasets.load_from_disk(str(path)))
        if local:
            return _read_files(path)
        if _is_hub_id(str(dataset)):
            return _by_name(datasets.load_dataset(str(dataset), subset, revision=revision))
    except BayesifyError:
        raise
    except Exception as error:  # every reader behind `datasets` has its own errors
        place = "read from disk" if path.exists() else "loaded from the Hugging Face Hub (there is no such path)"
        raise DataError(
            f"data set {str(dataset)!r} could not be {place}: {type(error).__name__}: {_brief(error)}"
        ) from error
    raise DataError(f"data set {str(dataset)!r} does not exist: no such file or folder, and not a Hub id.")


def _read_files(path: Path) -> dict[str, Dataset]:
    import datasets

    images = image_files(path) if path.is_dir() else {}
    # A folder of images may hold a table about them, but Parquet files in the folder itself are the data.
    tables = None if images and not any(path.glob("*.parquet")) else table_files(path)
    if tables is None and not images:
        raise DataError(
            f"{path} holds no data: expected images (one folder per class), Parquet, CSV or JSON files, "
            "or a folder written by save_to_disk."
        )
    with _quiet():
        if tables is None:
            metadata = any(Path(file).stem == "metadata" for files in images.values() for file in files)
            flat = any(Path(file).parent == path for files in images.values() for file in files)
            drop = None if metadata else flat
            if not metadata and not flat:
                _check_depth(images)
            return dict(datasets.load_dataset("imagefolder", data_files=images, drop_labels=drop).items())  # type: ignore
        kind, files = tables
        # One call a split: columns may differ, as in unlabeled or out-of-distribution files.
        return {name: _read_table(kind, names) for name, names in files.items()}


def _check_depth(images: dict[str, list[str]]) -> None:
    """Raise `DataError` for a folder inside that of a class: its name would be taken for a class."""
    for files in images.values():
        top = min(file.count(os.sep) for file in files)  # of millions of files, perhaps
        deeper = next((file for file in files if file.count(os.sep) > top), None)
        if deeper is not None:
            raise DataError(
                f"{deeper} lies deeper than other images, in a folder inside that of a class. The class of an image is "
                "the name of the folder that it is in: move it up."
            )


def _read_table(kind: str, files: list[str]) -> Dataset:
    import datasets

    options = {"sep": "\t"} if all(file.endswith(".tsv") for file in files) else {}
    return datasets.load_dataset(kind, data_files=files, split="train", **options)  # type: ignore[reportReturnType]


def _by_name(loaded: Any) -> dict[str, Dataset]:
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        return {canonical_split(str(name)): data for name, data in loaded.items()}
    if isinstance(loaded, datasets.Dataset):
        return {canonical_split(str(loaded.split or "train")): loaded}
    raise DataError(f"expected a data set with rows; found {type(loaded).__name__}.")


def _as_input(data: Dataset, split: str, kind: Kind, columns: list[str | None]) -> Dataset:
    import datasets

    for column in columns:
        if column is None or column not in data.column_names:
            if column is not None:
                raise DataError(f"split {split!r} lacks column {column!r}; it has {', '.join(data.column_names)}.")
            continue
        feature = data.features[column]
        if not (is_image if kind == "image" else is_text)(feature):
            raise DataError(f"column {column!r} of split {split!r} does not hold {kind}s: its type is {feature}.")
        if kind == "image" and (not isinstance(feature, datasets.Image) or not feature.decode):
            data = data.cast_column(column, datasets.Image())
    return data


def _only(splits: dict[str, Dataset], spec: str) -> dict[str, Dataset]:
    from datasets import ReadInstruction

    match = _SPLIT.fullmatch(spec.strip())
    name = canonical_split(match["name"]) if match else spec
    if name not in splits:
        raise DataError(f"the data set has no split {spec!r}; its splits: {', '.join(splits)}. Choose one of them.")
    data = splits[name]
    if match and match["slice"]:
        try:
            (part,) = ReadInstruction.from_spec(f"part{match['slice']}").to_absolute({"part": len(data)})
        except (ValueError, AssertionError) as error:
            raise DataError(f"split {spec!r} is not understood; write e.g. {name}[:100] or {name}[:10%].") from error
        data = data.select(range(len(data))[part.from_ : part.to])
    return {name: data}


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")


def _brief(error: Exception) -> str:
    cause = error.__cause__ if error.__cause__ is not None else error
    return " ".join(str(cause).split())[:500]


@contextmanager
def _quiet() -> Iterator[None]:
    from datasets.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
