"""One temperature for all members."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesify import BayesianModel, FineTuneConfig, FineTuner, bayesify, from_pretrained
from bayesify.calibration.temperature import best_temperature
from bayesify.errors import DataError, FormatError
from bayesify.predictive import Predictive


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).eval()


def converted(**options: Any) -> BayesianModel:
    torch.manual_seed(1)
    return bayesify(network(), **{"members": 3, "init_scale": 0.4, **options}).eval()


def data(count: int = 300) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(count, 5), torch.randint(3, (count,))


def test_it_is_the_best_of_a_grid() -> None:
    bnn, (x, _) = converted(), data()
    y = torch.multinomial(bnn.predict(x, seed=0).probs, 1).squeeze(1)
    with torch.no_grad():
        bnn.model[2].weight *= 5.0  # type: ignore[operator, index]
        outputs = bnn.predict(x, samples=2, seed=0).outputs
    found = bnn.fit_temperature([(x, y)], samples=2)
    grid = [math.exp(number / 100) for number in range(-250, 290)]
    losses = [float(Predictive(outputs / t).nll(y)) for t in grid]
    assert found == bnn.temperature
    assert found > 2
    assert found == pytest.approx(grid[losses.index(min(losses))], rel=0.02)


def test_labels_drawn_from_the_model_at_a_temperature_give_it_back() -> None:
    torch.manual_seed(0)
    outputs = 3 * torch.randn(1, 1, 50_000, 4)
    labels = torch.multinomial((outputs[0, 0] / 2.5).softmax(-1), 1).squeeze(1)
    assert best_temperature(Predictive(outputs), labels) == pytest.approx(2.5, rel=0.03)


def test_every_way_to_predict_divides_the_logits_of_every_member() -> None:
    bnn, (x, _) = converted(), data(8)
    plain = bnn.predict(x).outputs
    expected = Predictive(plain / 1.7)
    bnn.temperature = 1.7
    torch.testing.assert_close(bnn.predict(x).outputs, expected.outputs)
    torch.testing.assert_close(bnn(x).softmax(-1), expected.probs)
    fused = bnn.fuse()
    torch.testing.assert_close(fused(x).softmax(-1), expected.probs)
    torch.testing.assert_close(fused.predict(x).member_probs, expected.member_probs)
    assert not torch.allclose(expected.probs, Predictive(plain).probs, atol=1e-3)


def test_training_does_not_see_it() -> None:
    bnn, (x, _) = converted(posterior="deterministic"), data(4)
    bnn.train()
    before = bnn(x)
    bnn.temperature = 3.0
    assert torch.equal(bnn(x), before)


def test_labels_of_several_kinds() -> None:
    x, _ = data()
    bnn = converted(task="multilabel")
    labels = (torch.rand(len(x), 3) < bnn.predict(x).probs).float()
    bnn.temperature = 1.0
    assert bnn.fit_temperature([(x, labels)]) == pytest.approx(1.0, abs=0.35)


def test_it_is_saved_and_read(tmp_path: Path) -> None:
    bnn, (x, y) = converted(), data()
    before = bnn(x)
    bnn.fit_temperature([(x, y)])
    assert not torch.allclose(bnn(x), before, atol=1e-3)
    bnn.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, base_model=network())
    assert isinstance(loaded, BayesianModel)
    assert loaded.temperature == bnn.temperature
    torch.testing.assert_close(loaded(x), bnn(x))


@pytest.mark.parametrize("value", ["0", "-1.0", "null", "true", '"hot"', "NaN", "Infinity"])
def test_a_hostile_temperature_is_refused(tmp_path: Path, value: str) -> None:
    converted().save_pretrained(tmp_path)
    config = tmp_path / "bayesify_config.json"
    config.write_text(config.read_text().replace('"temperature": 1.0', f'"temperature": {value}'))
    with pytest.raises(FormatError, match="temperature"):
        from_pretrained(tmp_path, base_model=network())


def test_a_file_without_the_field_has_none(tmp_path: Path) -> None:
    bnn = converted()
    bnn.save_pretrained(tmp_path)
    config = tmp_path / "bayesify_config.json"
    content = config.read_text().replace('  "temperature": 1.0,\n  "conformal": null\n', "")
    config.write_text(content.rstrip().removesuffix("}").rstrip().rstrip(",") + "\n}\n")
    loaded = from_pretrained(tmp_path, base_model=network())
    assert isinstance(loaded, BayesianModel)
    assert loaded.temperature == 1.0
    assert loaded.conformal is None


def test_a_failed_fit_changes_nothing() -> None:
    bnn, (x, _) = converted(), data()
    bnn.temperature = 1.3
    with pytest.raises(DataError, match="labels"):
        bnn.fit_temperature([x])
    y = torch.randint(3, (len(x),))
    for inputs, labels, message in ((x, torch.full_like(y, -100), "no label counts"), (x / 0, y, "not finite")):
        with pytest.raises(DataError, match=message):
            bnn.fit_temperature([(inputs, labels)])
    assert bnn.temperature == 1.3
    values = bayesify(nn.Linear(3, 1), members=2)
    with pytest.raises(DataError, match="regression"):
        values.fit_temperature([(torch.randn(4, 3), torch.randn(4, 1))])
    assert values.temperature == 1.0


def test_what_was_fitted_to_another_predictive_is_dropped() -> None:
    bnn, (x, y) = converted(), data()
    bnn.fit_temperature([(x, y)])
    bnn.fit_sets([(x, y)])
    rows = torch.utils.data.TensorDataset(x, y)
    FineTuner(bnn, rows, None, FineTuneConfig(steps=1), progress=False).fit()
    assert bnn.temperature == 1.0
    assert bnn.conformal is None
    bnn.fit_sets([(x, y)])
    bnn.fit_temperature([(x, y)])
    assert bnn.conformal is None
    bnn.fit_spread([(x, y)])
    assert bnn.temperature == 1.0
