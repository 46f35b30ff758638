"""The whole way: numbers, report files and pictures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bayesify.errors import ConfigError, DataError, FormatError
from bayesify.evaluation import Evaluation, classification_metrics, evaluate, ood_metrics, plots
from bayesify.files import replacing
from bayesify.predictive import Predictive

from .fakes import FakeBayesian, Lookup

INDEX = torch.arange(97)


def picture(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def share(pixels: np.ndarray[Any, Any], color: str, tolerance: int = 6) -> float:
    """Share of the pixels of about this color."""
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(pixels - rgb).max(-1) <= tolerance).mean())


@pytest.fixture
def everything(case: tuple[Predictive, Tensor], tmp_path: Path) -> tuple[Evaluation, Path]:
    far = torch.randn(3, 2, 97, 5, generator=torch.Generator().manual_seed(1))
    model = FakeBayesian(torch.cat([case[0].outputs, far], dim=2))
    baseline = Lookup(torch.cat([3 * case[0].outputs[0, 0], far[0, 0]]))
    evaluation = evaluate(
        model,
        [(INDEX[:50], case[1][:50]), (INDEX[50:], case[1][50:])],
        out_of_distribution=[(INDEX + 97, torch.full((97,), 10**6))],
        baseline=baseline,
        samples=2,
        seed=3,
        class_names=["ant", "bee|wasp", "cat", "$x^", "[red]eel"],
        output=tmp_path / "report",
        progress=False,
    )
    return evaluation, tmp_path / "report"


def test_numbers_are_those_of_the_metrics(case: tuple[Predictive, Tensor], everything: tuple[Evaluation, Path]) -> None:
    evaluation, _ = everything
    baseline = Predictive(3 * case[0].outputs[:1, :1])
    assert evaluation.metrics == {
        "bayesian": classification_metrics(*case),
        "deterministic": classification_metrics(baseline, case[1]),
    }
    assert evaluation.outside is not None
    assert evaluation.ood["bayesian"] == ood_metrics(case[0], evaluation.outside)
    assert evaluation.ood["deterministic"]["auroc_mutual_information"] == 0.5
    found = (evaluation.num_examples, evaluation.members, evaluation.samples, evaluation.seed)
    assert found == (97, 3, 2, 3)
    assert sum(row["examples"] for row in evaluation.classes) == 97


def test_report_round_trip(everything: tuple[Evaluation, Path]) -> None:
    evaluation, folder = everything
    assert Evaluation.load(folder) == evaluation
    assert sorted(path.name for path in folder.iterdir()) == [
        "reliability.png",
        "report.json",
        "report.md",
        "risk_coverage.png",
        "uncertainty.png",
    ]


def test_infinite_values_survive_strict_json(tmp_path: Path) -> None:
    evaluation = Evaluation({"m": {"nll": math.inf, "accuracy": 0.5}}, 1, 1, 1, 0)
    evaluation.save(tmp_path)
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert Evaluation.load(tmp_path) == evaluation
    assert "inf" in str(evaluation)


def test_markdown_shows_before_and_after_with_pictures(everything: tuple[Evaluation, Path]) -> None:
    evaluation, folder = everything
    text = (folder / "report.md").read_text()
    ours, theirs = (evaluation.metrics[name]["nll"] for name in ("bayesian", "deterministic"))
    assert ours < theirs
    assert f"| NLL ↓ | **{ours:.4f}** | {theirs:.4f} | nats | mean −log" in text
    assert "bee\\|wasp" in text
    for name in ("reliability.png", "risk_coverage.png", "uncertainty.png"):
        assert f"]({name})" in text
    columns = {line.replace("\\|", "").count("|") for line in text.split("\n\n")[2].splitlines()}
    assert columns == {6}  # every row of the main table has the same cells


def test_table_as_text(everything: tuple[Evaluation, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = str(everything[0])
    assert "\x1b" not in text
    for part in ("bayesian", "deterministic", "ECE ↓", "Accuracy ↑", "AUROC, entropy ↑", "nats", "members 3"):
        assert part in text


def test_names_with_markup_are_shown_as_they_are(case: tuple[Predictive, Tensor], tmp_path: Path) -> None:
    name = "$net_{[bold]|"
    evaluation = evaluate(FakeBayesian(case[0].outputs), [(INDEX, case[1])], name=name, output=tmp_path, progress=False)
    assert name in str(evaluation)
    assert "$net_{[bold]\\|" in (tmp_path / "report.md").read_text()


def test_pictures_hold_the_data(everything: tuple[Evaluation, Path]) -> None:
    _, folder = everything
    reliability = picture(folder / "reliability.png")
    assert share(reliability, plots.BLUE) > 0.05
    assert reliability.shape[1] > reliability.shape[0]  # two columns
    uncertainty, risk = picture(folder / "uncertainty.png"), picture(folder / "risk_coverage.png")
    for color in (plots.BLUE, plots.RED, plots.ORANGE):
        assert share(uncertainty, color) > 0.0005
    for color in (plots.BLUE, plots.ORANGE):
        assert share(risk, color) > 0.0005


def test_gap_color_tells_too_confident_from_not_confident_enough(tmp_path: Path) -> None:
    probs = torch.tensor([[0.75, 0.25]]).repeat(20, 1)
    predictive = Predictive(probs.log()[None, None])
    drawn = []
    for right in (0, 20):
        targets = torch.tensor([0] * right + [1] * (20 - right))
        plots.reliability_diagram({"m": (predictive, targets)}, tmp_path / "one.png")
        pixels = picture(tmp_path / "one.png")
        drawn.append([share(pixels, plots._box(color)["facecolor"]) for color in (plots.RED, plots.GREEN)])
    (red_wrong, green_wrong), (red_right, green_right) = drawn
    assert red_wrong > 2 * red_right
    assert green_right > 2 * green_wrong


@pytest.mark.parametrize("examples", [1, 3])
def test_pictures_of_degenerate_data(tmp_path: Path, examples: int) -> None:
    predictive = Predictive(torch.tensor([[100.0, 0.0]]).repeat(examples, 1)[None, None])  # entropy 0
    targets = torch.zeros(examples, dtype=torch.long)
    plots.reliability_diagram({"m": (predictive, targets)}, tmp_path / "a.png")
    plots.risk_coverage({"m": (predictive, targets)}, tmp_path / "b.png")
    plots.uncertainty_histogram(predictive, None, tmp_path / "c.png", targets == 0)
    for name in "abc":
        assert len(np.unique(picture(tmp_path / f"{name}.png").reshape(-1, 3), axis=0)) > 5


def test_plots_name_what_does_not_fit(case: tuple[Predictive, Tensor], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="97 examples; found 2"):
        plots.uncertainty_histogram(case[0], None, tmp_path / "a.png", torch.tensor([True, False]))
    with pytest.raises(DataError, match="no prediction"):
        plots.risk_coverage({}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_regression_has_numbers_and_no_pictures(tmp_path: Path) -> None:
    net = nn.Linear(2, 1)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    data = [(torch.randn(4, 2), torch.tensor([3.0, -3.0, 3.0, -3.0]))]
    evaluation = evaluate(net, data, name="zero", output=tmp_path, progress=False)
    assert evaluation.metrics["zero"] == pytest.approx({"rmse": 3.0, "epistemic_variance": 0.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_misuse_is_named(case: tuple[Predictive, Tensor]) -> None:
    model, baseline = FakeBayesian(case[0].outputs), Lookup(case[0].outputs[0, 0])
    data = [(INDEX, case[1])]
    with pytest.raises(DataError, match="data is an iterator"):
        evaluate(model, iter(data), baseline=baseline, progress=False)
    with pytest.raises(ConfigError, match="choose another name"):
        evaluate(model, data, baseline=baseline, name="deterministic", progress=False)
    with pytest.raises(DataError, match="no labels"):
        evaluate(model, [INDEX], progress=False)
    with pytest.raises(DataError, match="2 class names"):
        evaluate(model, data, class_names=["a", "b"], progress=False)
    values = [(torch.randn(4, 2), torch.randn(4))]
    with pytest.raises(ConfigError, match="is for classes; these are outputs of a regression"):
        evaluate(nn.Linear(2, 1), values, out_of_distribution=values, progress=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("{", "cannot read"),
        ("[]", "format_version is None"),
        ('{"format_version": 2}', "is 2; expected 1"),
        ('{"format_version": 1, "metrics": {}}', "not an evaluation report"),
        ('{"format_version": 1, "metrics": {}, "ood": {}, "evil": 1}', "not an evaluation report"),
        ('{"format_version": 1, "metrics": {"a": {"nll": "x"}}, "ood": {}}', "not an evaluation report"),
    ],
)
def test_a_bad_report_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        Evaluation.load(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ha")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_importing_evaluation_is_light() -> None:
    code = "import sys, bayesify.evaluation; print({'matplotlib', 'torchmetrics'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
