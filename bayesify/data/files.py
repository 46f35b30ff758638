"""Which files make which split: folders, globs and single files of tables or images."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from bayesify.errors import DataError

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
# The first format that a folder holds is read: a JSON file next to Parquet files describes them.
TABLE_FORMATS = {
    "parquet": (".parquet",),
    "csv": (".csv", ".tsv"),
    "json": (".jsonl", ".ndjson", ".json"),
}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

_SHARD = re.compile(r"[-_.]?\d+-of-\d+(-[0-9a-f]+)?$")
_NUMBER = re.compile(r"[-_.]\d+$")


def canonical_split(name: str) -> str:
    """`train`, `validation` or `test` for their usual spellings; any other name as it is."""
    return SPLIT_WORDS.get(name.lower(), name)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was written by `save_to_disk` of `datasets`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def table_files(path: str | Path) -> tuple[str, dict[str, list[str]]] | None:
    """The table format and the files of each split of a file, a folder or a glob; None if there is no table.

    Raises:
        DataError: a single file or a glob names something else than Parquet, CSV or JSON.
    """
    root = Path(path)
    if root.is_dir():
        files = _visible(root, root.iterdir()) or _visible(root, root.rglob("*"))
        for kind, suffixes in TABLE_FORMATS.items():
            if found := [file for file in files if file.suffix.lower() in suffixes]:
                return kind, _by_split(found, root)
        return None
    files = [root] if root.is_file() else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [file for file in files if file.is_file()]
    if not files:
        return None
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise DataError(f"{path} mixes {' and '.join(sorted(kinds))} files; give files of one format.")
    return kinds.pop(), _by_split(files, None)


def image_files(root: Path) -> dict[str, list[str]]:
    """The image (and metadata) files of each split of a folder of images; empty if it holds no image.

    Split folders are recognized only if every top-level folder with images in it is named as a split, so that
    a class called "test" stays a class.
    """
    found = [file for file in _visible(root, root.rglob("*")) if _is_image(file)]
    if not found:
        return {}
    metadata = [f for f in _visible(root, root.rglob("metadata.*")) if f.suffix in (".csv", ".jsonl", ".parquet")]
    tops = {file.relative_to(root).parts[0] for file in found if file.parent != root}
    if not tops or len(tops) != len({canonical_split(top) for top in tops} & set(SPLIT_WORDS.values())):
        return {"train": [str(file) for file in found + metadata]}
    splits: dict[str, list[str]] = {}
    for file in found + metadata:
        if file.parent != root:
            splits.setdefault(canonical_split(file.relative_to(root).parts[0]), []).append(str(file))
    return splits


def _visible(root: Path, files: Iterable[Path]) -> list[Path]:
    hidden = (".", "_")
    files = [f for f in files if not any(part.startswith(hidden) for part in f.relative_to(root).parts)]
    known = {suffix for suffixes in TABLE_FORMATS.values() for suffix in suffixes}
    return sorted(f for f in files if (f.suffix.lower() in known or _is_image(f)) and f.is_file())


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _kind(file: Path) -> str:
    for kind, suffixes in TABLE_FORMATS.items():
        if file.suffix.lower() in suffixes:
            return kind
    known = ", ".join(suffix for suffixes in TABLE_FORMATS.values() for suffix in suffixes)
    raise DataError(f"{file} is not a table this can read; expected one of {known}, or a folder of images.")


def _by_split(files: list[Path], root: Path | None) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for file in files:
        stem = _SHARD.sub("", file.stem) or file.stem
        if _NUMBER.sub("", stem).lower() in SPLIT_WORDS:
            stem = _NUMBER.sub("", stem)
        if root is not None and stem.lower() not in SPLIT_WORDS and file.parent != root:
            folder = file.parent.name
            stem = folder if folder.lower() in SPLIT_WORDS else stem
        groups.setdefault(canonical_split(stem), []).append(str(file))
    if set(groups) & set(SPLIT_WORDS.values()):
        return groups
    if len(groups) == 1:
        ((stem, names),) = groups.items()
        words = _split_words(stem)
        return {words.pop() if len(words) == 1 else "train": names}
    # No file is called exactly "train", "validation" or "test": then `flowers_train.csv` may mean train, if
    # only one file says so.
    meant = {stem: _split_words(stem) for stem in groups}
    claims = [words for words in meant.values() if words]
    renamed = {}
    for stem, names in groups.items():
        sole = len(meant[stem]) == 1 and claims.count(meant[stem]) == 1
        renamed[next(iter(meant[stem])) if sole else stem] = names
    return renamed


def _split_words(stem: str) -> set[str]:
    return {SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", stem.lower()) if word in SPLIT_WORDS}
