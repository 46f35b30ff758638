"""What the tests of the integrations share: their scripts, and what these leave in an output folder."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bayesify import FineTuner
from bayesify.errors import FormatError

ROOT = Path(__file__).parents[2]
INTEGRATIONS = ROOT / "integrations"


def load_script(folder):
    """The run.py of an integration, as a module with a name of its own."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}_run", folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(folder, *arguments):
    """What the run.py of an integration prints as a command of its own, in which warnings are errors."""
    command = [sys.executable, "-W", "error", folder / "run.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_log(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def check_interrupted_run(run, folder, monkeypatch):
    """A run that stops at its second validation goes on, only by --resume, with the numbers of an unbroken one."""
    options = {"option": ["eval_every=2"]}
    run(folder / "whole", **options)
    validate, calls = FineTuner.validate, []

    def interrupted(self):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(self)

    monkeypatch.setattr(FineTuner, "validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder / "broken", **options)
    with pytest.raises(FormatError, match="--resume"):
        run(folder / "broken", **options)
    run(folder / "broken", resume=True, **options)
    whole, broken = (load_file(folder / name / "bayesify.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())
    reports = [json.loads((folder / name / "report.json").read_text())["metrics"] for name in ("whole", "broken")]
    assert reports[0] == reports[1]
