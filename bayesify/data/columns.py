"""Which column is the input and which the label, and one label encoding for all splits."""

from __future__ import annotations

import difflib
import random
from typing import TYPE_CHECKING, Any, Literal

from bayesify.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["image", "text"]

LABEL_COLUMNS = ("label", "labels", "target", "class")
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
_PEEK = 200


def check_column(splits: dict[str, Dataset], column: str, option: str) -> None:
    """Raise `DataError` naming the columns that exist, and the nearest, if no split has `column`."""
    names = sorted({name for data in splits.values() for name in data.column_names})
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{option}={column!r} is not a column of the data; columns: {', '.join(names)}.{hint}")


def find_label(splits: dict[str, Dataset]) -> str | None:
    """The label column: one of the usual names, else the only `ClassLabel` column, else None (no labels).

    Raises:
        DataError: there are several `ClassLabel` columns and none has a usual name.
    """
    from datasets import ClassLabel

    features = _features(splits)
    for name in LABEL_COLUMNS:
        if name in features:
            return name
    found = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if len(found) > 1:
        raise DataError(f"several columns hold class labels: {', '.join(found)}; choose one with label_column.")
    return found[0] if found else None


def find_input(splits: dict[str, Dataset], label: str | None) -> tuple[Kind, str, str | None]:
    """Kind, input column and (for well-known pairs of texts) second column: an image if any, else a text.

    Raises:
        DataError: no column holds images or texts.
    """
    features = _features(splits)
    for name, feature in features.items():
        if is_image(feature):
            return "image", name, None
    texts = [name for name, feature in features.items() if is_text(feature) and name != label]
    if not texts:
        raise DataError(
            f"no column holds images or texts; columns: {_describe(features)}. "
            "Name one with image_column or text_column."
        )
    for first, second in TEXT_PAIRS:
        if first in texts and second in texts:
            return "text", first, second
    return "text", max(texts, key=lambda name: _mean_length(splits, name)), None


def is_image(feature: Any) -> bool:
    """Whether a column holds images: the `Image` feature, or the bytes and path it is stored as."""
    from datasets import Image

    return isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def is_text(feature: Any) -> bool:
    from datasets import Value

    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def column_values(data: Dataset, column: str) -> list[Any]:
    """The values of one column; no other column (an image, say) is decoded."""
    return data.select_columns([column]).with_format(None)[:][column]


def encode_labels(splits: dict[str, Dataset], column: str) -> tuple[dict[str, Dataset], list[str]]:
    """Give `column` one `ClassLabel` for every split: the one there is, or the sorted values of all splits.

    A split without the column, or with nothing but missing labels (None or -1), comes back without it.

    Raises:
        DataError: labels are neither integers nor strings.
    """
    from datasets import ClassLabel

    values: dict[str, list[Any]] = {}
    declared: dict[str, list[str]] = {}
    unlabeled = []
    for name, data in splits.items():
        if column not in data.column_names:
            continue
        feature = data.features[column]
        found = column_values(data, column)
        if all(value is None or value == -1 for value in found):
            unlabeled.append(name)
            continue
        if isinstance(feature, ClassLabel):
            declared[name] = list(feature.names)
            found = [None if v is None else feature.names[v] if 0 <= v < len(feature.names) else -1 for v in found]
        elif wrong := next((v for v in found if v is not None and not isinstance(v, int | str)), None):
            raise DataError(
                f"label column {column!r} of split {name!r} holds {type(wrong).__name__} values such as "
                f"{wrong!r}; expected integers or strings, one per class. Choose another with label_column."
            )
        values[name] = found
    names, codes = _codes(values, declared)
    encoded = {name: data.remove_columns(column) if name in unlabeled else data for name, data in splits.items()}
    for name, found in values.items():
        if declared.get(name) != names:
            labels = [-1 if value is None else codes.get(value, value) for value in found]
            data = encoded[name].remove_columns(column)
            encoded[name] = data.add_column(column, labels, feature=ClassLabel(names=names))  # type: ignore[reportCallIssue]
    return encoded, names


def _codes(values: dict[str, list[Any]], declared: dict[str, list[str]]) -> tuple[list[str], dict[Any, int]]:
    seen = {value for found in values.values() for value in found} - {None, -1}
    names = list(dict.fromkeys(name for declaration in declared.values() for name in declaration))
    if declared:  # an integer beside declared names already is a class number
        names += sorted({value for value in seen if isinstance(value, str)} - set(names))
        return names, {name: code for code, name in enumerate(names)}
    ordered = sorted(seen, key=lambda value: (isinstance(value, str), value))
    return [str(value) for value in ordered], {value: code for code, value in enumerate(ordered)}


def _features(splits: dict[str, Dataset]) -> dict[str, Any]:
    return {name: feature for data in reversed(splits.values()) for name, feature in data.features.items()}


def _mean_length(splits: dict[str, Dataset], column: str) -> float:
    data = next(data for data in splits.values() if column in data.column_names)
    rows = sorted(random.Random(0).sample(range(len(data)), min(_PEEK, len(data))))
    texts = column_values(data.select(rows), column)
    return sum(len(text or "") for text in texts) / max(len(texts), 1)


def _describe(features: dict[str, Any]) -> str:
    return ", ".join(f"{name} ({getattr(f, 'dtype', type(f).__name__)})" for name, f in features.items())
