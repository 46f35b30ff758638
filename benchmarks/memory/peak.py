"""The memory of one contender, seen from inside of a process of its own."""

from __future__ import annotations

import ctypes
import gc
import warnings
from pathlib import Path

import torch

from benchmarks.speed.contenders import Contender
from benchmarks.speed.networks import NETWORKS


def peak_of(contender: Contender, name: str, batch: int, members: int, calls: int) -> dict[str, float]:
    """MiB of resident memory: `libraries` before the network is built, `built` after, and the `peak` of its calls.

    What is loaded at first use, code and caches of libraries, is in all three: a call on few examples comes first.
    """
    warnings.simplefilter("ignore")
    _call(contender, name, min(batch, members), members, 1)
    libraries = _settled()
    built, peak = _call(contender, name, batch, members, calls)
    return {"libraries": libraries, "built": built, "peak": peak}


def _call(contender: Contender, name: str, batch: int, members: int, calls: int) -> tuple[float, float]:
    """(built, peak)."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    call = contender(network, network.build().eval(), network.inputs(batch), members)
    built = _settled()
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    for _ in range(calls):
        call()
    return built, _status("VmHWM")


def _settled() -> float:
    """Resident memory now, without what was freed and not yet given back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024
