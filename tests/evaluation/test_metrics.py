"""Every metric against a closed form or a loop written out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesify.errors import DataError
from bayesify.evaluation import classification_metrics, ood_metrics, regression_metrics, scores
from bayesify.evaluation.metrics import calibration_bins, class_table, risk_coverage_curve
from bayesify.evaluation.scores import score
from bayesify.predictive import Predictive


def from_probs(probs: list[list[float]]) -> Predictive:
    """One member that gives these probabilities."""
    return Predictive(torch.tensor(probs, dtype=torch.float64).log()[None, None])


def test_every_metric_equals_its_loop(case: tuple[Predictive, Tensor]) -> None:
    predictive, targets = case
    p = torch.softmax(predictive.outputs.double(), -1).numpy()  # [K, S, B, C]
    members, _, examples, classes = p.shape
    mixture, single = p.mean((0, 1)), p.mean(1)
    y = targets.numpy()

    nll = brier = entropy = conditional = member_nll = 0.0
    confidences, hits, member_hits = [], [], []
    for b in range(examples):
        nll -= math.log(mixture[b, y[b]])
        brier += sum((mixture[b, c] - (c == y[b])) ** 2 for c in range(classes))
        entropy -= sum(q * math.log(q) for q in mixture[b])
        conditional -= sum(q * math.log(q) for q in p[:, :, b].ravel()) / (members * 2)
        member_nll -= sum(math.log(single[k, b, y[b]]) for k in range(members)) / members
        member_hits += [single[k, b].argmax() == y[b] for k in range(members)]
        confidences.append(mixture[b].max())
        hits.append(mixture[b].argmax() == y[b])

    ece = 0.0
    for i in range(15):
        inside = [b for b in range(examples) if i / 15 <= confidences[b] < (i + 1) / 15]
        if inside:
            gap = np.mean([hits[b] for b in inside]) - np.mean([confidences[b] for b in inside])
            ece += len(inside) / examples * abs(gap)

    order = sorted(range(examples), key=lambda b: -confidences[b])
    aurc = np.mean([1 - np.mean([hits[b] for b in order[:n]]) for n in range(1, examples + 1)])
    pairs = list(itertools.combinations(range(members), 2))
    differ = np.mean([single[j, b].argmax() != single[k, b].argmax() for j, k in pairs for b in range(examples)])

    assert classification_metrics(predictive, targets) == pytest.approx(
        {
            "accuracy": np.mean(hits),
            "nll": nll / examples,
            "ece": ece,
            "brier": brier / examples,
            "aurc": aurc,
            "disagreement": differ,
            "member_nll": member_nll / examples,
            "member_accuracy": np.mean(member_hits),
            "entropy": entropy / examples,
            "mutual_information": (entropy - conditional) / examples,
        },
        abs=1e-6,
    )
    assert 0 < differ < 1


def test_uniform_guess_has_its_closed_forms() -> None:
    metrics = classification_metrics(Predictive(torch.zeros(1, 1, 8, 4)), torch.arange(8) % 4)
    assert metrics["nll"] == metrics["entropy"] == pytest.approx(math.log(4))
    assert metrics["brier"] == pytest.approx(0.75)
    assert metrics["accuracy"] == pytest.approx(0.25)
    assert metrics["ece"] == pytest.approx(0.0, abs=1e-7)  # 25 % sure and right 25 % of the time
    assert metrics["aurc"] == pytest.approx(0.75)  # all tied: every coverage has the same risk
    assert metrics["mutual_information"] == metrics["disagreement"] == 0.0


def test_two_sure_members_that_contradict_each_other() -> None:
    outputs = torch.tensor([[40.0, -40.0], [-40.0, 40.0]])[:, None, None]
    metrics = classification_metrics(Predictive(outputs), torch.tensor([0]))
    assert metrics["mutual_information"] == pytest.approx(math.log(2))
    assert metrics["nll"] == pytest.approx(math.log(2))
    assert metrics["member_nll"] == pytest.approx(40.0)  # (0 + 80) / 2
    assert metrics["member_accuracy"] == 0.5
    assert metrics["disagreement"] == 1.0


def test_certain_and_right_is_perfectly_calibrated_and_certain_and_wrong_is_not() -> None:
    # Float32 rounds these confidences to 1, which must stay in the last bin together with 0.96.
    outputs = torch.tensor([[100.0, 0.0], [100.0, 0.0], [math.log(0.96 / 0.04), 0.0]])[None, None]
    right = classification_metrics(Predictive(outputs), torch.tensor([0, 0, 0]))
    assert right["ece"] == pytest.approx(0.04 / 3, abs=1e-6)
    mixed = classification_metrics(Predictive(outputs), torch.tensor([1, 1, 0]))
    assert mixed["ece"] == pytest.approx(2.96 / 3 - 1 / 3, abs=1e-6)  # apart, they would give 2.04 / 3
    wrong = classification_metrics(Predictive(outputs[:, :, :2]), torch.tensor([1, 1]))
    assert wrong["ece"] == pytest.approx(1.0, abs=1e-6)
    assert wrong["brier"] == pytest.approx(2.0)
    assert wrong["nll"] == pytest.approx(100.0)


def test_aurc_on_four_examples_by_hand() -> None:
    predictive = from_probs([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.7, 0.3]])
    targets = torch.tensor([0, 0, 1, 0])  # by confidence: right, wrong, right, right
    risks = [0, 1 / 2, 1 / 3, 1 / 4]
    assert risk_coverage_curve(score(predictive, targets)).tolist() == pytest.approx(risks)
    assert classification_metrics(predictive, targets)["aurc"] == pytest.approx(sum(risks) / 4)


def test_tied_confidences_do_not_depend_on_the_order_of_the_data() -> None:
    predictive = from_probs([[0.9, 0.1], [0.7, 0.3], [0.7, 0.3]])
    one, other = (risk_coverage_curve(score(predictive, torch.tensor(y))) for y in ([0, 0, 1], [0, 1, 0]))
    assert one.tolist() == other.tolist() == pytest.approx([0, 0.25, 1 / 3])


def test_calibration_bins_add_up_to_the_ece(case: tuple[Predictive, Tensor]) -> None:
    columns = score(*case)
    count, accuracy, confidence = calibration_bins(columns)
    gaps = (count / count.sum() * (accuracy - confidence).abs()).nansum()
    assert count.sum() == 97
    assert float(gaps) == pytest.approx(classification_metrics(*case)["ece"])


def test_chunks_change_nothing(case: tuple[Predictive, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = classification_metrics(*case)
    monkeypatch.setattr(scores, "CHUNK_ELEMENTS", 3 * 2 * 5 * 10)  # ten examples at a time
    assert classification_metrics(*case) == pytest.approx(whole, abs=1e-7)


def test_tokens_count_as_examples(case: tuple[Predictive, Tensor]) -> None:
    predictive, targets = case
    grid = Predictive(predictive.outputs[:, :, :96].reshape(3, 2, 12, 8, 5))
    flat = Predictive(predictive.outputs[:, :, :96])
    expected = classification_metrics(flat, targets[:96])
    assert classification_metrics(grid, targets[:96].reshape(12, 8)) == pytest.approx(expected)


def test_a_single_example() -> None:
    metrics = classification_metrics(from_probs([[0.2, 0.8]]), torch.tensor([1]))
    assert metrics["accuracy"] == 1.0
    assert metrics["aurc"] == 0.0
    assert metrics["ece"] == pytest.approx(0.2)
    assert metrics["nll"] == pytest.approx(-math.log(0.8))


def test_auc_pr_equals_its_loop_with_ties_together() -> None:
    chances, targets = [0.9, 0.8, 0.8, 0.6, 0.3, 0.2], [1, 0, 1, 0, 1, 0]
    found, recalled = 0.0, 0
    for threshold in sorted(set(chances), reverse=True):
        hits = [y for p, y in zip(chances, targets, strict=True) if p >= threshold]
        found += (sum(hits) - recalled) / 3 * (sum(hits) / len(hits))
        recalled = sum(hits)
    metrics = classification_metrics(from_probs([[1 - p, p] for p in chances]), torch.tensor(targets))
    assert metrics["auc_pr"] == pytest.approx(found)
    assert list(metrics).index("auc_pr") == list(metrics).index("aurc") + 1


def test_auc_pr_sees_order_among_probabilities_that_round_to_one() -> None:
    outputs = torch.tensor([[0.0, 60.0], [0.0, 50.0], [0.0, 40.0], [0.0, -5.0]])[None, None]
    assert classification_metrics(Predictive(outputs), torch.tensor([1, 1, 0, 0]))["auc_pr"] == 1.0
    assert classification_metrics(Predictive(outputs), torch.tensor([0, 0, 1, 0]))["auc_pr"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("classes", "targets"), [(3, [0, 1, 2]), (2, [0, 0, 0]), (2, [1, 1, 1])])
def test_auc_pr_is_left_out_where_it_has_no_meaning(classes: int, targets: list[int]) -> None:
    assert "auc_pr" not in classification_metrics(Predictive(torch.randn(1, 1, 3, classes)), torch.tensor(targets))


def test_auroc_known_cases() -> None:
    sure, unsure = from_probs([[0.99, 0.01]] * 4), from_probs([[0.5, 0.5]] * 3)
    assert ood_metrics(sure, unsure)["auroc_entropy"] == 1.0
    assert ood_metrics(unsure, sure)["auroc_entropy"] == 0.0
    assert ood_metrics(sure, sure)["auroc_entropy"] == 0.5  # constant doubt is blind
    assert ood_metrics(sure, unsure)["auroc_mutual_information"] == 0.5  # one member has none


def test_auroc_equals_counting_pairs_with_ties_as_half(case: tuple[Predictive, Tensor]) -> None:
    inside = Predictive(case[0].outputs[:, :, :40] * 3)
    outside = Predictive(torch.cat([case[0].outputs[:, :, 40:70], inside.outputs[:, :, :5]], dim=2))
    for name, value in ood_metrics(inside, outside).items():
        low, high = (getattr(side, name.removeprefix("auroc_")).tolist() for side in (inside, outside))
        wins = [(o > i) + 0.5 * (o == i) for o in high for i in low]
        assert value == pytest.approx(np.mean(wins), abs=1e-6)


def test_auroc_sees_doubts_far_below_a_nat_beside_large_ones() -> None:
    # torchmetrics puts scores above 1 through a sigmoid, which would make 1e-25 and 1e-20 nats equal.
    margins = {"sure": [60.0, 60.0], "less": [50.0, 50.0, 0.0]}
    sure, less = (Predictive(torch.tensor([[m, 0, 0, 0] for m in margins[key]])[None, None]) for key in margins)
    assert 0 < sure.entropy.max() < less.entropy.min() < 1e-18
    assert less.entropy.max() > 1
    assert ood_metrics(sure, less)["auroc_entropy"] == 1.0


def test_regression_by_hand() -> None:
    outputs = torch.tensor([[[1.0], [5.0]], [[3.0], [5.0]]])[:, None]  # two members, two examples
    metrics = regression_metrics(Predictive(outputs, "regression"), torch.tensor([2.0, 1.0]))
    assert metrics["rmse"] == pytest.approx(math.sqrt((0 + 16) / 2))
    assert metrics["epistemic_variance"] == pytest.approx((1 + 0) / 2)


def test_class_table_lists_the_hardest_first_and_skips_the_absent() -> None:
    predictive = from_probs([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    columns = score(predictive, torch.tensor([0, 1, 1]))
    assert class_table(columns, ["ant", "bee", "cat"]) == [
        {"class": "bee", "examples": 2, "accuracy": 0.5},
        {"class": "ant", "examples": 1, "accuracy": 1.0},
    ]
    with pytest.raises(DataError, match="2 class names for a model with 3"):
        class_table(columns, ["ant", "bee"])


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (torch.zeros(1, 1, 2, 3), torch.tensor([0, 3]), "label 3 is out of range"),
        (torch.zeros(1, 1, 2, 3), torch.tensor([0, -1]), "label -1 is out of range"),
        (torch.zeros(1, 1, 2, 3), torch.tensor([0.0, 1.0]), "integer classes"),
        (torch.zeros(1, 1, 2, 3), torch.tensor([0]), "shape"),
        (torch.zeros(1, 1, 0, 3), torch.tensor([], dtype=torch.long), "empty"),
        (torch.zeros(1, 1, 2, 1), torch.tensor([0, 0]), "no choice of a class"),
        (torch.tensor([[[[math.nan, 0.0], [0.0, 0.0]]]]), torch.tensor([0, 0]), "NaN.*1 of 2"),
    ],
)
def test_bad_input_is_named(outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        classification_metrics(Predictive(outputs), targets)


def test_empty_side_of_ood_and_wrong_task_are_named(case: tuple[Predictive, Tensor]) -> None:
    with pytest.raises(DataError, match="97 inside, 0 outside"):
        ood_metrics(case[0], Predictive(torch.zeros(1, 1, 0, 5)))
    with pytest.raises(DataError, match="regression"):
        classification_metrics(Predictive(case[0].outputs, "regression"), case[1])
    with pytest.raises(DataError, match="classification"):
        regression_metrics(*case)
