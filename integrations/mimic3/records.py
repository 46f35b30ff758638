"""Intensive-care stays as hourly features, from files of MIMIC-III or PhysioNet 2012. Nothing is cached."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from discretize import Scaling
from sources import (
    MIMIC3_CATEGORICAL,
    MIMIC3_VARIABLES,
    PHYSIONET_CATEGORICAL,
    PHYSIONET_VARIABLES,
    Stays,
    read_sets,
    read_stays,
)
from torch import Tensor
from torch.utils.data import TensorDataset

from bayesify.errors import DataError

VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class Episodes:
    """N stays: `features` float32 [N, 48, F], `labels` int64 [N] (1: died in hospital), N patients, F names."""

    features: Tensor
    labels: Tensor
    patients: list[str]
    names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def dataset(self) -> TensorDataset:
        """Pairs (features [48, F], label)."""
        return TensorDataset(self.features, self.labels)

    def batches(self, size: int = 500) -> list[tuple[Tensor, Tensor]]:
        """Everything in order, as pairs (features [B, 48, F], labels [B])."""
        return list(zip(self.features.split(size), self.labels.split(size), strict=True))


def load(folder: str | Path, seed: int = 0) -> dict[str, Episodes]:
    """Read whichever of the two layouts is in the folder; see `load_mimic3` and `load_physionet2012`."""
    folder = Path(folder)
    if (folder / "test" / "listfile.csv").exists():
        return load_mimic3(folder, seed)
    if list(folder.glob("outcomes-*.parquet")):
        return load_physionet2012(folder, seed=seed)
    raise DataError(
        f"{folder}: found neither test/listfile.csv (MIMIC-III) nor outcomes-a.parquet (PhysioNet 2012); expected the "
        "folder of one of the two."
    )


def load_mimic3(folder: str | Path, seed: int = 0) -> dict[str, Episodes]:
    """In-hospital mortality of MIMIC-III, in the files that the public mimic3-benchmarks write.

    Args:
        folder: holds `train/` and `test/`, each with `listfile.csv` (columns stay, y_true) and the stays it names.
            With `train_listfile.csv` and `val_listfile.csv` these say which stays of `train/` validate; otherwise
            20 % of the patients do, drawn with `seed`, with the same share of deaths.

    Returns:
        {"train", "validation", "test"}; no patient is in two of them.

    Raises:
        DataError: a file or column is missing, a label is not 0 or 1, a cell cannot be read, or a patient is in two
            splits.
    """
    folder = Path(folder)
    test = read_stays(folder / "test", folder / "test" / "listfile.csv")
    given = folder / "val_listfile.csv"
    if given.exists():
        train = read_stays(folder / "train", folder / "train_listfile.csv")
        validation = read_stays(folder / "train", given)
    else:
        train, validation = _split(read_stays(folder / "train", folder / "train" / "listfile.csv"), seed)
    stays = {"train": train, "validation": validation, "test": test}
    return _finish(folder, stays, MIMIC3_VARIABLES, MIMIC3_CATEGORICAL)


def load_physionet2012(folder: str | Path, train: str = "a", test: str = "b", seed: int = 0) -> dict[str, Episodes]:
    """In-hospital mortality of PhysioNet 2012, from `set-x.parquet` and `outcomes-x.parquet`.

    Args:
        train, test: letters of the sets; 20 % of the training patients validate, drawn with `seed`, with the same share
            of deaths.

    Returns, Raises: as `load_mimic3`.
    """
    folder = Path(folder)
    training, validation = _split(read_sets(folder, train), seed)
    stays = {"train": training, "validation": validation, "test": read_sets(folder, test)}
    return _finish(folder, stays, PHYSIONET_VARIABLES, PHYSIONET_CATEGORICAL)


def _split(stays: Stays, seed: int) -> tuple[Stays, Stays]:
    """Training and validation stays, apart by patient, with the same share of patients who died in each."""
    patients, index = np.unique(stays.patients, return_inverse=True)
    died = np.bincount(index, weights=stays.labels) > 0
    order = np.random.default_rng(seed).permutation(len(patients))
    chosen = np.zeros(len(patients), dtype=bool)
    for group in (order[died[order]], order[~died[order]]):
        chosen[group[: round(VALIDATION_SHARE * len(group))]] = True
    return stays[~chosen[index]], stays[chosen[index]]


def _finish(
    folder: Path, stays: dict[str, Stays], names: tuple[str, ...], categorical: tuple[str, ...]
) -> dict[str, Episodes]:
    """Features of every split, with the statistics of the training split."""
    seen: dict[str, str] = {}
    for split, part in stays.items():
        if len(part.labels) == 0:
            raise DataError(f"{folder}: the {split} split is empty; expected at least one stay in each split.")
        for patient in np.unique(part.patients):
            if patient in seen:
                raise DataError(
                    f"{folder}: patient {patient} is in both the {seen[patient]} and the {split} split; expected every "
                    "patient in one."
                )
            seen[patient] = split
    scaling = Scaling.fit(stays["train"].grid, names, categorical)
    return {
        split: Episodes(
            torch.from_numpy(scaling(part.grid)),
            torch.from_numpy(part.labels),
            part.patients.tolist(),
            scaling.feature_names,
        )
        for split, part in stays.items()
    }
