"""Two processes with gloo, started as several GPUs would be."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def two_processes() -> tuple[str, ...]:
    """What stands between the interpreter and a script or `-m module`, with a port that is free."""
    # `accelerate launch --cpu` starts several processes under MPI only; torchrun always does.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}")


def alone_and_together(function: Callable[[Path], Any], folder: Path) -> tuple[Path, Path]:
    """Call a function of a test module with a folder here, and with another one in each of two processes."""
    alone, together = folder / "alone", folder / "together"
    for made in (alone, together):
        made.mkdir()
    function(alone)
    _call_in_two_processes(function, together)
    return alone, together


def _call_in_two_processes(function: Callable[[Path], Any], folder: Path) -> None:
    file = Path(function.__code__.co_filename)
    script = folder / "script.py"
    script.write_text(
        f"import sys, torch\nsys.path[:0] = {[str(file.parent), str(Path(__file__).parent)]!r}\n"
        "torch.set_num_threads(1)\nfrom pathlib import Path\n"
        f"from {file.stem} import {function.__name__}\n{function.__name__}(Path({str(folder)!r}))\n"
        # A group that is left open may abort a process at its end.
        "if torch.distributed.is_initialized():\n    torch.distributed.destroy_process_group()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, *two_processes(), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
