"""Sets of classes with a guarantee."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesify import BayesianModel, bayesify, from_pretrained
from bayesify.calibration.sets import FREE_RANKS, Conformal, conformity
from bayesify.errors import BayesifyError, ConfigError, DataError, FormatError
from bayesify.predictive import Predictive

CLASSES = 8


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, CLASSES)).eval()


def converted(**options: Any) -> BayesianModel:
    torch.manual_seed(1)
    return bayesify(network(), **{"members": 3, "init_scale": 0.3, **options}).eval()


def data(count: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Labels that the network gives with noise: it is right often, and wrong about how often."""
    torch.manual_seed(seed)
    x = torch.randn(count, 5)
    with torch.no_grad():
        y = torch.multinomial((2 * network()(x)).softmax(-1), 1).squeeze(1)
    return x, y


@pytest.mark.parametrize("penalty", [0.0, 0.05])
def test_scores_are_those_of_a_loop(penalty: float) -> None:
    torch.manual_seed(0)
    probs = torch.randn(6, CLASSES).softmax(-1)
    found = conformity(probs, penalty)
    for row, scores in zip(probs.double(), found, strict=True):
        for c in range(CLASSES):
            above = [p for p in row if p >= row[c]]
            expected = sum(above) + penalty * max(0, len(above) - FREE_RANKS)
            torch.testing.assert_close(scores[c], torch.as_tensor(expected))


def test_a_set_is_what_the_quantile_of_the_scores_lets_in() -> None:
    scores = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    conformal = Conformal(scores, 0.0, None)
    probs = torch.tensor([[0.45, 0.3, 0.2, 0.05], [0.95, 0.03, 0.01, 0.01]])
    # (4 + 1) · 0.6 = 3: the third smallest score, 0.7; cumulative 0.45, 0.75, 0.95, 1, and the top class is always in
    assert conformal.sets(probs, 0.4).tolist() == [[True, False, False, False], [True, False, False, False]]
    # the fourth, 0.9
    assert conformal.sets(probs, 0.2).tolist() == [[True, True, False, False], [True, False, False, False]]
    # five of four scores would be needed: nothing can be left out
    assert conformal.sets(probs, 0.1).all()


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5])
def test_the_true_class_is_covered(alpha: float) -> None:
    """Over many splits the mean coverage is at least 1 − alpha, and not far above it."""
    bnn, (x, y) = converted(), data(6000)
    probs = bnn.predict(x).probs
    covered, sizes = [], []
    for seed in range(30):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        cal, test = order[:200], order[200:]
        scores = conformity(probs[cal], 0.01).gather(1, y[cal, None]).squeeze(1).sort().values
        sets = Conformal(scores, 0.01, None).sets(probs[test], alpha)
        covered.append(float(sets.gather(1, y[test, None]).double().mean()))
        sizes.append(float(sets.sum(1).double().mean()))
    mean = sum(covered) / len(covered)
    assert mean >= 1 - alpha - 0.01
    assert sum(sizes) / len(sizes) < CLASSES
    if alpha < 0.5:  # sets that always hold the top class cannot cover less than its accuracy
        assert mean <= 1 - alpha + 0.06


def test_rounding_does_not_decide() -> None:
    """Of few classes most thresholds are a sum of all: one, but for the last digit."""
    probs = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    other = probs * (1 + 6e-8 * torch.randn(200, 3, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(probs, other)
    labels = probs.argsort(-1)[:, 0]  # always the least probable
    scores = conformity(probs, 0.01).gather(-1, labels[:, None]).squeeze(-1)
    assert (scores == 1.0).all()
    for alpha in (0.05, 0.1, 0.5):
        sets = [Conformal(scores.sort().values, 0.01, None).sets(p, alpha) for p in (probs, other)]
        assert torch.equal(*sets)
        assert sets[0].all()


def test_of_a_model() -> None:
    bnn, (x, y) = converted(), data(500)
    fitted = bnn.fit_sets([(x[:250], y[:250]), (x[250:], y[250:])], penalty=0.02)
    probs = bnn.predict(x).probs
    expected = conformity(probs, 0.02).gather(1, y[:, None]).squeeze(1).sort().values
    torch.testing.assert_close(fitted.scores, expected)
    fresh, _ = data(40, seed=5)
    sets = bnn.predict(fresh).sets(0.2)
    assert sets.shape == (40, CLASSES)
    assert sets.gather(1, bnn.predict(fresh).probs.argmax(1, keepdim=True)).all()
    assert torch.equal(sets, Conformal(expected, 0.02, None).sets(bnn.predict(fresh).probs, 0.2))
    parts = Predictive.cat([bnn.predict(fresh[:10]), bnn.predict(fresh[10:])])
    assert torch.equal(parts.sets(0.2), sets)
    assert torch.equal(bnn.fuse().predict(fresh).sets(0.2), sets)


def test_examples_whose_label_does_not_count_are_left_out() -> None:
    bnn, (x, y) = converted(), data(200)
    expected = bnn.fit_sets([(x[50:], y[50:])]).scores
    y[:50] = -100
    torch.testing.assert_close(bnn.fit_sets([(x, y)]).scores, expected)
    with pytest.raises(DataError, match="no label counts"):
        bnn.fit_sets([(x[:50], y[:50])])


def test_they_are_saved_and_read(tmp_path: Path) -> None:
    bnn, (x, y) = converted(), data(300)
    bnn.fit_sets([(x, y)], samples=2)
    bnn.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, base_model=network())
    assert isinstance(loaded, BayesianModel)
    expected = bnn.predict(x, samples=2, seed=0).sets(0.3)
    assert torch.equal(loaded.predict(x, samples=2, seed=0).sets(0.3), expected)
    assert not expected.all()
    bnn.conformal = None
    bnn.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path, base_model=network()).predict(x).conformal is None


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    bnn, (x, y) = converted(), data(50)
    bnn.fit_sets([(x, y)])
    bnn.save_pretrained(tmp_path)
    config = tmp_path / "bayesify_config.json"
    text = config.read_text()
    for old, new in (
        ('"penalty": 0.01', '"penalty": -1'),
        ('"penalty"', '"fine"'),
        ('"samples": null', '"samples": "x"'),
    ):
        config.write_text(text.replace(old, new))
        with pytest.raises(FormatError, match=r"conformal|penalty"):
            from_pretrained(tmp_path, base_model=network())
    cut = text.index('"conformal"')
    config.write_text(text[:cut] + '"conformal": null\n}\n')
    with pytest.raises(FormatError, match="go together"):
        from_pretrained(tmp_path, base_model=network())


def test_what_has_no_sets() -> None:
    bnn, (x, y) = converted(), data(50)
    with pytest.raises(DataError, match="fit_sets"):
        bnn.predict(x).sets()
    bnn.fit_sets([(x, y)], samples=3)
    with pytest.raises(DataError, match="samples=3"):
        bnn.predict(x).sets()
    for alpha in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="alpha"):
            bnn.predict(x, samples=3).sets(alpha)
    with pytest.raises(ConfigError, match="penalty"):
        bnn.fit_sets([(x, y)], penalty=-1.0)
    several = converted(task="multilabel")
    with pytest.raises(ConfigError, match="one class"):
        several.fit_sets([(x, torch.ones(50, CLASSES))])
    assert several.conformal is None
    with pytest.raises(BayesifyError, match="finite"):
        Conformal(torch.tensor([]), 0.0, None)
