"""The files of MIMIC-III and PhysioNet 2012, checked row by row, as hourly grids."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from discretize import hourly

from bayesify.errors import DataError

MIMIC3_VARIABLES = (
    "Capillary refill rate",
    "Diastolic blood pressure",
    "Fraction inspired oxygen",
    "Glascow coma scale eye opening",
    "Glascow coma scale motor response",
    "Glascow coma scale total",
    "Glascow coma scale verbal response",
    "Glucose",
    "Heart Rate",
    "Height",
    "Mean blood pressure",
    "Oxygen saturation",
    "Respiratory rate",
    "Systolic blood pressure",
    "Temperature",
    "Weight",
    "pH",
)
MIMIC3_CATEGORICAL = tuple(name for name in MIMIC3_VARIABLES if name.startswith(("Capillary", "Glascow")))

GLASGOW_SCORES = {
    # eyes
    "none": 1, "to pain": 2, "to speech": 3, "spontaneously": 4,
    # words; a patient with a tube cannot speak
    "no response": 1, "no response-ett": 1, "incomprehensible sounds": 2, "inappropriate words": 3, "confused": 4,
    "oriented": 5,
    # movement; "no response" as above
    "abnormal extension": 2, "abnormal flexion": 3, "flex-withdraws": 4, "localizes pain": 5, "obeys commands": 6,
}  # fmt: skip
"""The two record systems behind MIMIC-III write "4 Spontaneously" and "Spontaneously"; both become 4."""

PHYSIONET_DESCRIPTORS = ("Age", "Gender", "Height", "ICUType", "Weight")
"""Given once, at admission; −1 means unknown. Weight is measured later too."""
PHYSIONET_VARIABLES = (
    *PHYSIONET_DESCRIPTORS,
    *("ALP", "ALT", "AST", "Albumin", "BUN", "Bilirubin", "Cholesterol", "Creatinine", "DiasABP", "FiO2", "GCS"),
    *("Glucose", "HCO3", "HCT", "HR", "K", "Lactate", "MAP", "MechVent", "Mg", "NIDiasABP", "NIMAP", "NISysABP"),
    *("Na", "PaCO2", "PaO2", "Platelets", "RespRate", "SaO2", "SysABP", "Temp", "TroponinI", "TroponinT", "Urine"),
    *("WBC", "pH"),
)
PHYSIONET_CATEGORICAL = ("ICUType", "MechVent")
"""MechVent is 1 or absent: as a category it reads "ventilated so far"."""


@dataclass(frozen=True)
class Stays:
    """Stays before scaling: the hourly grid [N, 48, V], labels [N], patients [N]."""

    grid: np.ndarray
    labels: np.ndarray
    patients: np.ndarray

    def __getitem__(self, index: np.ndarray) -> Stays:
        return Stays(self.grid[index], self.labels[index], self.patients[index])


# ------------------------------------------------------------------------------------------------ MIMIC-III


def read_stays(folder: Path, listfile: Path) -> Stays:
    """The stays that a list names, with the files in `folder`."""
    listed = _read_csv(listfile, ("stay", "y_true"))
    names = listed["stay"].to_pylist()
    labels = _labels(listfile, listed["y_true"].to_pylist(), first=2)
    tables = []
    for line, name in enumerate(names, 2):
        if name is None or not (folder / name).is_file():
            raise DataError(
                f"{listfile}, line {line}: names the stay {name!r}; expected a file of that name in {folder}."
            )
        tables.append(_read_csv(folder / name, ("Hours", *MIMIC3_VARIABLES)))
    rows = np.array([table.num_rows for table in tables])
    episode = np.repeat(np.arange(len(tables)), rows)
    line = np.concatenate([np.arange(count) + 2 for count in rows])
    cells = pa.concat_tables(tables)

    def where(row: int) -> str:
        return f"{folder / names[episode[row]]}, line {int(line[row])}"

    hours = _numbers(cells["Hours"].to_pandas(), "Hours", where)
    parts = []
    for column, name in enumerate(MIMIC3_VARIABLES):
        present = np.flatnonzero(cells[name].is_valid())
        read = _scores if name in MIMIC3_CATEGORICAL else _numbers
        value = read(cells[name].take(pa.array(present)).to_pandas(), name, lambda i, p=present: where(p[i]))
        parts.append((episode[present], hours[present], np.full(len(present), column), value))
    grid = hourly(*(np.concatenate(p) for p in zip(*parts, strict=True)), (len(names), len(MIMIC3_VARIABLES)))
    return Stays(grid, labels, np.array([name.split("_")[0] for name in names]))


def _read_csv(path: Path, columns: tuple[str, ...]) -> pa.Table:
    """Columns of a CSV file as text; an empty cell is null, the word None is not."""
    text = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.string()), null_values=[""], strings_can_be_null=True
    )
    try:
        table = pa.csv.read_csv(path, pa.csv.ReadOptions(use_threads=False), convert_options=text)
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: not found; expected a CSV file with the columns {', '.join(columns[:3])} …"
        ) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error}).") from error
    return _select(path, table, columns)


def _numbers(text: Any, name: str, where: Callable[[int], str]) -> np.ndarray:
    values = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    if (bad := np.flatnonzero(~np.isfinite(values))).size:
        raise DataError(f"{where(bad[0])}: {name} is {text.iloc[bad[0]]!r}; expected a number.")
    return values


def _scores(text: Any, name: str, where: Callable[[int], str]) -> np.ndarray:
    """Categories as numbers: the number that a text begins with, or the score of its words."""
    codes, known = text.factorize()
    scores = np.full(len(known), np.nan)
    for index, words in enumerate(known):
        number = re.match(r"\s*(\d+(\.\d+)?)(\s|$)", words)
        scores[index] = float(number[1]) if number else GLASGOW_SCORES.get(words.strip().lower(), np.nan)
    values = scores[codes]
    if (bad := np.flatnonzero(np.isnan(values))).size:
        raise DataError(
            f"{where(bad[0])}: {name} is {text.iloc[bad[0]]!r}; expected a number, a text that begins with one, or one "
            f"of {', '.join(map(repr, GLASGOW_SCORES))}."
        )
    return values


# ------------------------------------------------------------------------------------------------ PhysioNet 2012


def read_sets(folder: Path, letters: str) -> Stays:
    if not letters:
        raise DataError("no set of PhysioNet 2012 is named; expected letters such as 'a' or 'ac'.")
    parts = [_read_set(folder, letter) for letter in letters]
    return Stays(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("grid", "labels", "patients")))


def _read_set(folder: Path, letter: str) -> Stays:
    outcomes = folder / f"outcomes-{letter}.parquet"
    listed = _read_parquet(outcomes, ("record_id", "in_hospital_death"))
    patients = listed["record_id"].to_numpy()
    if len(repeated := np.flatnonzero(np.bincount(np.unique(patients, return_inverse=True)[1]) > 1)):
        raise DataError(f"{outcomes}: patient {np.unique(patients)[repeated[0]]} has more than one row; expected one.")
    labels = _labels(outcomes, listed["in_hospital_death"].to_pylist(), first=0)

    path = folder / f"set-{letter}.parquet"
    table = _read_parquet(path, ("record_id", "minutes", "parameter", "value"))
    record, minutes, value = (table[name].to_numpy() for name in ("record_id", "minutes", "value"))
    order = np.argsort(patients)
    episode = order[np.searchsorted(patients, record, sorter=order).clip(max=len(patients) - 1)]
    if (bad := np.flatnonzero(patients[episode] != record)).size:
        raise DataError(
            f"{path}, row {bad[0]}: patient {record[bad[0]]} is not in {outcomes.name}; expected an outcome."
        )
    encoded = table["parameter"].combine_chunks().dictionary_encode()
    known = {name: column for column, name in enumerate(PHYSIONET_VARIABLES)}
    columns = np.array([known.get(name, -1) for name in encoded.dictionary.to_pylist()])
    variable = columns[encoded.indices.to_numpy(zero_copy_only=False)]
    if (bad := np.flatnonzero(variable < 0)).size:
        raise DataError(
            f"{path}, row {bad[0]}: parameter {table['parameter'][int(bad[0])].as_py()!r} is unknown; expected one of "
            f"{', '.join(PHYSIONET_VARIABLES)}."
        )
    unknown = (variable < len(PHYSIONET_DESCRIPTORS)) & (value == -1)
    value = np.where(unknown, np.nan, value)
    grid = hourly(episode, minutes / 60.0, variable, value, (len(patients), len(PHYSIONET_VARIABLES)))
    return Stays(grid, labels, patients.astype(str))


def _read_parquet(path: Path, columns: tuple[str, ...]) -> pa.Table:
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found; expected a Parquet file with the columns {', '.join(columns)}.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}).") from error
    table = _select(path, table, columns)
    for name in columns:
        if table[name].null_count:
            row = int(np.flatnonzero(table[name].is_null())[0])
            raise DataError(f"{path}, row {row}: {name} is missing; expected a value.")
    return table


# ------------------------------------------------------------------------------------------------ both


def _select(path: Path, table: pa.Table, columns: tuple[str, ...]) -> pa.Table:
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise DataError(f"{path}: has no column {missing[0]!r}; expected the columns {', '.join(columns)}.")
    return table.select(list(columns))


def _labels(path: Path, values: list[Any], first: int) -> np.ndarray:
    """[N] int64; rows of tables are counted from 0, lines of text from 1 with the header."""
    place = "line" if first else "row"
    for row, value in enumerate(values, first):
        if str(value) not in ("0", "1"):
            raise DataError(f"{path}, {place} {row}: the label is {value!r}; expected 0 (survived) or 1 (died).")
    if not values:
        raise DataError(f"{path}: lists no stay; expected at least one.")
    return np.array([int(value) for value in values])
