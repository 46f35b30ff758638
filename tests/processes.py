"""Two processes with gloo, started as several GPUs would be."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def two_processes() -> tuple[str, ...]:
    """What stands between the interpreter and a script or `-m module`, with a port that is free."""
    # `accelerate launch --cpu` starts several processes under MPI only; torchrun always does.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}")


def alone_and_together(functions: Sequence[Callable[[Path], Any]], folder: Path) -> dict[str, tuple[Path, Path]]:
    """Call functions of a test module, each with a folder here, and with another one in each of two processes."""
    names = [function.__name__ for function in functions]
    folders = {name: (folder / "alone" / name, folder / "together" / name) for name in names}
    for function, (alone, together) in zip(functions, folders.values(), strict=True):
        alone.mkdir(parents=True)
        together.mkdir(parents=True)
        function(alone)
    calls = {name: together for name, (_, together) in folders.items()}
    _call_in_two_processes(Path(functions[0].__code__.co_filename), calls, folder / "script.py")
    return folders


def _call_in_two_processes(file: Path, calls: Mapping[str, Path], script: Path) -> None:
    """Call functions of a file, each with its folder; one start for all, as it takes most of the time."""
    lines = [f"{name}(Path({str(folder)!r}))\n" for name, folder in calls.items()]
    script.write_text(
        f"import sys, torch\nsys.path[:0] = {[str(file.parent), str(Path(__file__).parent)]!r}\n"
        "torch.set_num_threads(1)\nfrom pathlib import Path\n"
        f"from {file.stem} import {', '.join(calls)}\n{''.join(lines)}"
        # A group that is left open may abort a process at its end.
        "if torch.distributed.is_initialized():\n    torch.distributed.destroy_process_group()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, *two_processes(), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
