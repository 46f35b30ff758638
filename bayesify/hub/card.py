"""The model card: what the model is, how to use it, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayesify.config import Rank1Config
from bayesify.hub.origin import Origin

if TYPE_CHECKING:
    from bayesify.model import BayesianModel


def write_card(path: Path, model: BayesianModel, origin: Origin, folder: Path) -> None:
    """Write README.md; numbers and pictures are taken from a report in `folder`, if there is one."""
    from huggingface_hub import ModelCardData

    report = _report(folder / "report.json")
    metrics = report.get("metrics", {}).get("bayesian", {})
    data: dict[str, Any] = {
        "library_name": "bayesify",
        "tags": ["bayesify", "uncertainty", "bayesian-neural-network"],
    }
    if origin.id and not origin.is_local and origin.library != "module":
        data["base_model"] = origin.id if "/" in origin.id else f"timm/{origin.id}"
    if metrics:
        data["metrics"] = sorted(metrics)
    config, summary = model.config, model.report
    name = None if origin.is_local else origin.id  # a folder of this machine means nothing to others
    lines = [
        "---",
        ModelCardData(**data).to_yaml(),
        "---",
        "",
        f"# {name or origin.architecture}, Bayesian",
        "",
        f"A rank-1 Bayesian neural network with {config.members} members: `{origin.architecture}` "
        f"{_factors_of(config)}. All members share one copy of its weights; "
        f"{len(summary.converted)} linear maps carry factors, "
        f"which adds {100 * summary.parameter_overhead:.2f} % of parameters.",
        "",
        "```python",
        "from bayesify import from_pretrained",
        "",
        'bnn = from_pretrained("this-repository-or-folder")',
        "prediction = bnn.predict(inputs)  # .probs, .entropy, .mutual_information",
        "```",
        "",
    ]
    if model.label_names:
        shown = ", ".join(model.label_names[:20]) + (", …" if len(model.label_names) > 20 else "")
        lines += [f"Classes ({len(model.label_names)}): {shown}", ""]
    if metrics:
        lines += [
            f"## Measured on {report.get('num_examples', '?')} examples",
            "",
            "| metric | value |",
            "| --- | --- |",
        ]
        lines += [f"| {name} | {value:.4f} |" for name, value in metrics.items() if isinstance(value, float)]
        lines.append("")
    if (folder / "reliability.png").is_file():
        lines += ["![Reliability diagram](reliability.png)", ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def _factors_of(config: Rank1Config) -> str:
    """What the factors do to the network, in words."""
    sides = {"both": "inputs and outputs", "inputs": "inputs", "outputs": "outputs"}[config.factors]
    verb = "multiplied by" if config.perturbation == "multiplicative" else "shifted by"
    if config.posterior == "deterministic":
        return f"whose linear maps have their {sides} {verb} vectors of each member's own (BatchEnsemble)"
    families = f"posterior {config.posterior}, prior {config.prior}"
    return f"whose linear maps have their {sides} {verb} random vectors ({families})"


def _report(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
