"""Tasks against torch.distributions and sums written out by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily, Normal
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from bayesify import ELBO, BayesianModel, ConfigError, DataError, Predictive, bayesify, evaluate, from_pretrained, tasks
from bayesify.finetune import FineTuneConfig, FineTuner
from bayesify.tasks import TASKS, TaskName, task_of

K, B, D = 3, 4, 2


def network(outputs: int, task: Any) -> BayesianModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))
    return bayesify(model, members=K, init_scale=0.5, posterior_scale=0.2, task=task).eval()


def rows_of(bnn: BayesianModel, x: Tensor) -> Tensor:
    """[K, B, ...] outputs of the members at the posterior mean, as their merged networks give them."""
    return torch.stack([bnn.merge(k).eval()(x) for k in range(K)]).detach()


# ------------------------------------------------------------------------------------------------ soft labels


def test_probabilities_as_labels() -> None:
    """As mixup makes them: the mean log-likelihood under them."""
    bnn, x = network(5, "classification").train(), torch.randn(B, 6)
    soft = torch.rand(B, 5).softmax(-1)
    rows = bnn(x).detach()
    by_member = torch.stack([-F.cross_entropy(one, soft, reduction="none") for one in rows.view(K, B, 5)])
    torch.testing.assert_close(ELBO(bnn, 9)(rows, soft).nll, -by_member.mean())
    mixed = -(rows.view(K, B, 5).softmax(-1).mean(0).log() * soft).sum(-1).mean()
    torch.testing.assert_close(ELBO(bnn, 9, likelihood="mixture")(rows, soft).nll, mixed)
    found = bnn.eval().predict(x)
    torch.testing.assert_close(found.nll(soft), -(found.probs.log() * soft).sum(-1).mean())
    hard = torch.randint(5, (B,))
    one_hot = F.one_hot(hard, 5).float()
    torch.testing.assert_close(found.log_prob(one_hot), found.log_prob(hard))
    for wrong in (torch.randn(B, 5), one_hot * 2, -one_hot):
        with pytest.raises(DataError, match="not negative, and 1 in sum"):
            found.nll(wrong)


def test_training_on_probabilities_is_training_on_classes_where_they_are_certain() -> None:
    x, hard = torch.randn(16, 6), torch.randint(5, (16,))
    states = []
    for labels in (hard, F.one_hot(hard, 5).float()):
        bnn = network(5, "classification")
        data = TensorDataset(x, labels)
        config = FineTuneConfig(steps=3, batch_size=8)
        result = FineTuner(bnn, data, data, config, progress=False).fit()
        states.append((result.best_nll, [p.detach().clone() for p in bnn.parameters()]))
    assert states[0][0] == pytest.approx(states[1][0], rel=1e-5)
    for one, other in zip(states[0][1], states[1][1], strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(DataError, match="batch 0 has probabilities as labels"):
        evaluate(bnn, [(x, F.one_hot(hard, 5).float())])


# ------------------------------------------------------------------------------------------------ several labels


def test_probabilities_of_labels_are_averaged() -> None:
    bnn, x, y = network(5, "multilabel"), torch.randn(B, 6), torch.randint(2, (B, 5))
    p = rows_of(bnn, x).sigmoid()
    found = bnn.predict(x)
    torch.testing.assert_close(found.probs, p.mean(0))
    torch.testing.assert_close(bnn(x).sigmoid(), p.mean(0))
    entropy = Bernoulli(p.mean(0)).entropy()
    torch.testing.assert_close(found.entropy, entropy)
    torch.testing.assert_close(found.mutual_information, entropy - Bernoulli(p).entropy().mean(0), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.log_prob(y), Bernoulli(p.mean(0)).log_prob(y.float()))
    torch.testing.assert_close(found.log_prob(y.float()), found.log_prob(y.bool()))


def test_likelihood_of_labels_by_hand() -> None:
    bnn, x, y = network(5, "multilabel").train(), torch.randn(B, 6), torch.randint(2, (B, 5)).float()
    rows = bnn(x).detach().view(K, B, 5)
    by_label = Bernoulli(logits=rows).log_prob(y)
    output = rows.flatten(0, 1)
    torch.testing.assert_close(ELBO(bnn, 9)(output, y).nll, -by_label.mean())
    mixed = -(by_label.exp().mean(0).log()).mean()
    torch.testing.assert_close(ELBO(bnn, 9, likelihood="mixture")(output, y).nll, mixed)
    y[0, :3] = -100
    counted = y != -100
    torch.testing.assert_close(ELBO(bnn, 9)(output, y).nll, -by_label[:, counted].mean())


def test_certain_labels_stay_finite() -> None:
    outputs = torch.tensor([[200.0, -200.0], [150.0, -300.0]]).view(2, 1, 1, 2)
    found = Predictive(outputs, "multilabel")
    y = torch.tensor([[0, 1]])
    # Of the two members the less certain gives all of the probability.
    torch.testing.assert_close(found.log_prob(y), torch.tensor([[-150.0, -200.0]]) - math.log(2))
    mixed = TASKS["multilabel"].mixture(outputs.flatten(0, 1))
    torch.testing.assert_close(mixed, torch.tensor([[150.0 + math.log(2), -200.0 - math.log(2)]]))


def test_metrics_of_labels_are_those_of_their_questions() -> None:
    bnn, x = network(5, "multilabel"), torch.randn(40, 6)
    y = torch.randint(2, (40, 5)).float()
    metrics = evaluate(bnn, [(x[:30], y[:30]), (x[30:], y[30:])], progress=False).metrics["bayesian"]
    p = rows_of(bnn, x).sigmoid().mean(0)
    assert metrics["accuracy"] == pytest.approx(((p > 0.5) == (y > 0.5)).double().mean().item())
    assert metrics["nll"] == pytest.approx(F.binary_cross_entropy(p, y).item(), rel=1e-5)
    assert metrics["brier"] == pytest.approx((2 * (p - y).square()).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("task", "shape"),
    [
        ("classification", (4, 2, 7, 50)),
        ("classification", (4, 11, 60)),
        ("classification", (3, 2, 2, 700)),
        ("segmentation", (4, 2, 5, 9, 8)),
        ("segmentation", (3, 1, 4, 300)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_logits_are_mixed_piece_by_piece(
    task: TaskName, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = (5 * torch.randn(shape)).to(dtype)
    expected = outputs.double().softmax(-1 if task == "classification" else 2).mean(0).log()
    grads = []
    for piece in (1 << 19, 500):
        monkeypatch.setattr(tasks, "_PIECE", piece)
        given = outputs.clone().requires_grad_()
        found = TASKS[task].mixture(given)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        found.flatten()[::3].sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 5, 7), (2, 3, 2, 6, 5)], ids=["classes", "tokens", "labels"])
def test_doubt_is_computed_piece_by_piece(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes [B, ..., C], of K · S = 6 outputs."""
    task: TaskName = "multilabel" if len(shape) == 5 else "classification"
    outputs = 3 * torch.randn(2, 3, *shape)
    p = outputs.double().sigmoid() if task == "multilabel" else outputs.double().softmax(-1)
    family = Bernoulli if task == "multilabel" else Categorical
    entropy = family(p.mean((0, 1))).entropy()
    information = entropy - family(p).entropy().mean((0, 1))
    apart = outputs.mT.contiguous().mT  # as the classes of pixels lie in memory
    for piece, given in itertools.product((1 << 19, 20), (outputs, apart)):
        monkeypatch.setattr(tasks, "_PIECE", piece)
        found = Predictive(given, task)
        torch.testing.assert_close(found.probs.double(), p.mean((0, 1)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.mutual_information.double(), information, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ means and variances


def mixture_of_normals(rows: Tensor) -> MixtureSameFamily:
    """[K, B, 2D] -> the mixture over K of D independent normals."""
    mean, log_variance = rows.movedim(0, 1).chunk(2, -1)
    normal = Independent(Normal(mean, (log_variance / 2).exp()), 1)
    return MixtureSameFamily(Categorical(torch.ones(rows.shape[1], K)), normal)


def test_variance_has_two_parts() -> None:
    bnn, x, y = network(2 * D, "gaussian"), torch.randn(B, 6), torch.randn(B, D)
    rows = rows_of(bnn, x)
    mixture, found = mixture_of_normals(rows), bnn.predict(x)
    torch.testing.assert_close(found.mean, mixture.mean)
    torch.testing.assert_close(found.variance, mixture.variance)
    torch.testing.assert_close(found.aleatoric_variance, rows[..., D:].exp().mean(0))
    torch.testing.assert_close(found.epistemic_variance, rows[..., :D].var(0, unbiased=False))
    torch.testing.assert_close(found.log_prob(y), mixture.log_prob(y))
    torch.testing.assert_close(found.nll(y), -mixture.log_prob(y).mean() / D)
    # The call's outputs have the network's layout and the mixture's moments.
    mean, log_variance = bnn(x).chunk(2, -1)
    torch.testing.assert_close(mean, mixture.mean)
    torch.testing.assert_close(log_variance.exp(), mixture.variance)


def test_likelihood_of_normals_by_hand() -> None:
    bnn, x, y = network(2, "gaussian").train(), torch.randn(B, 6), torch.randn(B)
    output = bnn(x).detach()
    rows = output.view(K, B, 2)
    by_member = Normal(rows[..., 0], (rows[..., 1] / 2).exp()).log_prob(y)
    torch.testing.assert_close(ELBO(bnn, 9)(output, y).nll, -by_member.mean())
    mixed = mixture_of_normals(rows).log_prob(y[:, None])
    torch.testing.assert_close(ELBO(bnn, 9, likelihood="mixture")(output, y[:, None]).nll, -mixed.mean())


def test_extreme_variances_have_finite_gradients() -> None:
    outputs = torch.tensor([[[0.0, 1e4], [0.0, -1e4]]], requires_grad=True)
    log_prob = TASKS["gaussian"].log_prob(outputs, torch.ones(2, 1))
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()


def test_metrics_of_a_network_that_tells_its_noise() -> None:
    bnn, x, y = network(2, "gaussian"), torch.randn(50, 6), torch.randn(50)
    metrics = evaluate(bnn, [(x, y)], progress=False).metrics["bayesian"]
    mixture = mixture_of_normals(rows_of(bnn, x))
    mean, variance = mixture.mean.squeeze(-1), mixture.variance.squeeze(-1)
    inside = (y - mean).abs() <= Normal(0.0, 1.0).icdf(torch.tensor(0.95)) * variance.sqrt()
    assert metrics["nll"] == pytest.approx(-mixture.log_prob(y[:, None]).mean().item(), rel=1e-5)
    assert metrics["rmse"] == pytest.approx((y - mean).square().mean().sqrt().item(), rel=1e-5)
    assert metrics["coverage"] == pytest.approx(inside.double().mean().item())
    split = metrics["aleatoric_variance"] + metrics["epistemic_variance"]
    assert split == pytest.approx(variance.mean().item(), rel=1e-5)


def test_training_finds_the_noise() -> None:
    """y = x + noise, of standard deviation 0.1 for x < 0 and 1 for x > 0."""
    torch.manual_seed(0)
    x = torch.rand(600, 1) * 4 - 2
    y = x.squeeze(-1) + torch.randn(600) * torch.where(x.squeeze(-1) < 0, 0.1, 1.0)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2))
    bnn = bayesify(model, members=2, task="gaussian")
    config = FineTuneConfig(epochs=40, batch_size=32, learning_rate=1e-2)
    tuner = FineTuner(bnn, TensorDataset(x, y), TensorDataset(x, y), config, progress=False)
    before = tuner.validate()["validation_nll"]
    result = tuner.fit()
    assert result.best_nll is not None
    assert result.best_nll < before - 0.3
    assert tuner.validate()["validation_nll"] == pytest.approx(bnn.predict(x).nll(y).item(), rel=1e-4)
    deviation = bnn.predict(torch.tensor([[-1.0], [1.0]])).aleatoric_variance.sqrt().flatten().tolist()
    assert deviation[0] < 0.3 < 0.7 < deviation[1] < 1.4


def test_variance_alone_does_not_make_noise() -> None:
    """Without a variance of the network's own, the likelihood is that of the mean, and there is no aleatoric part."""
    found = Predictive(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), "regression")
    assert found.log_prob(torch.tensor([2.0])).item() == pytest.approx(-0.5 * math.log(2 * math.pi))
    assert found.variance.item() == found.epistemic_variance.item() == 1.0
    with pytest.raises(DataError, match="gaussian only"):
        _ = found.aleatoric_variance


# ------------------------------------------------------------------------------------------------ tokens and pixels


def test_tokens_without_a_label_do_not_count() -> None:
    torch.manual_seed(0)
    bnn = bayesify(nn.Linear(6, 5), members=K, init_scale=0.5, task="classification").train()
    x, y = torch.randn(B, 3, 6), torch.randint(5, (B, 3))
    y[:, 2], y[0, 0] = -100, -100
    rows = bnn(x)
    expected = F.cross_entropy(rows.flatten(0, 1), y.repeat(K, 1).flatten())
    torch.testing.assert_close(ELBO(bnn, 9)(rows, y).nll, expected)
    found = bnn.predict(x)
    expected = F.nll_loss(found.log_probs.flatten(0, 1), y.flatten())
    torch.testing.assert_close(found.nll(y), expected)
    metrics = evaluate(bnn, [(x, y)], progress=False).metrics["bayesian"]
    assert metrics["nll"] == pytest.approx(expected.item(), rel=1e-6)
    right = (found.probs.argmax(-1) == y)[y != -100]
    assert metrics["accuracy"] == pytest.approx(right.double().mean().item())


def test_nothing_labeled_is_no_loss() -> None:
    bnn = bayesify(nn.Linear(6, 5), members=K, task="classification").train()
    rows = bnn(torch.randn(B, 3, 6))
    assert ELBO(bnn, 9)(rows, torch.full((B, 3), -100)).nll.item() == 0.0


def segmenter() -> BayesianModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 5, 1))
    return bayesify(model, members=K, init_scale=0.5, posterior_scale=0.2, task="segmentation").eval()


def test_classes_of_pixels_are_in_the_second_dimension() -> None:
    bnn, x, y = segmenter(), torch.randn(B, 3, 8, 6), torch.randint(5, (B, 4, 3))
    p = rows_of(bnn, x).softmax(2)
    torch.testing.assert_close(bnn(x).exp(), p.mean(0))
    found = bnn.predict(x)
    torch.testing.assert_close(found.probs, p.mean(0).movedim(1, -1))
    torch.testing.assert_close(found.entropy, torch.special.entr(p.mean(0)).sum(1))
    torch.testing.assert_close(found.nll(y), F.nll_loss(p.mean(0).log(), y))
    rows = bnn.train()(x)
    torch.testing.assert_close(ELBO(bnn, 9)(rows, y).nll, F.cross_entropy(rows, y.repeat(K, 1, 1)))


def test_pixels_are_compared_at_the_resolution_of_the_labels(tmp_path: Path) -> None:
    bnn, x, y = segmenter(), torch.randn(B, 3, 8, 6), torch.randint(5, (B, 8, 6))
    y[:, 0] = -100
    larger = F.interpolate(rows_of(bnn, x).flatten(0, 1), size=(8, 6), mode="bilinear", align_corners=False)
    log_probs = larger.view(K, B, 5, 8, 6).softmax(2).mean(0).log()
    expected = F.nll_loss(log_probs, y)
    torch.testing.assert_close(bnn.predict(x).nll(y), expected)
    baseline = bnn.merge(1)
    result = evaluate(bnn, [(x, y)], baseline=baseline, output=tmp_path / "report", progress=False)
    assert result.metrics["bayesian"]["nll"] == pytest.approx(expected.item(), rel=1e-5)
    plain = F.cross_entropy(larger.view(K, B, 5, 8, 6)[1], y)
    assert result.metrics["deterministic"]["nll"] == pytest.approx(plain.item(), rel=1e-5)
    assert (tmp_path / "report" / "uncertainty.png").exists()
    rows = bnn.train()(x)
    resized = F.interpolate(rows, size=(8, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ELBO(bnn, 9)(rows, y).nll, F.cross_entropy(resized, y.repeat(K, 1, 1)))


# ------------------------------------------------------------------------------------------------ transformers


def tiny(name: str, **options: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 20,
    }
    if name.startswith("Bert"):
        config: Any = transformers.BertConfig(**small, vocab_size=30, max_position_embeddings=16, **options)
    elif name.startswith("Yolos"):
        config = transformers.YolosConfig(**small, image_size=[32, 32], num_detection_tokens=4, **options)
    elif name.startswith("Segformer"):
        config = transformers.SegformerConfig(
            depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16, num_attention_heads=[1, 1, 2, 2],
            **options,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=16, bos_token_id=1, eos_token_id=2, **options
        )
    return getattr(transformers, name)(config).eval()


@pytest.mark.parametrize(
    ("name", "options", "task"),
    [
        ("BertForSequenceClassification", {}, "classification"),
        ("BertForSequenceClassification", {"num_labels": 1}, "regression"),
        ("BertForSequenceClassification", {"problem_type": "regression", "num_labels": 3}, "regression"),
        ("BertForSequenceClassification", {"problem_type": "multi_label_classification"}, "multilabel"),
        ("BertForTokenClassification", {}, "classification"),
        ("BertForQuestionAnswering", {}, "classification"),
        ("BertForMaskedLM", {}, "classification"),
        ("BertForPreTraining", {}, "classification"),
        ("BertModel", {}, "regression"),
        ("SegformerForSemanticSegmentation", {}, "segmentation"),
        ("YolosForObjectDetection", {}, "members"),
        ("GPT2LMHeadModel", {}, "classification"),
    ],
)
def test_transformers_models_say_their_task(name: str, options: dict[str, Any], task: str) -> None:
    model = tiny(name, **options)
    assert task_of(model) == task
    assert task_of(type("Own", (type(model),), {})(model.config)) == task
    assert bayesify(model, members=2).task == task


def test_answers_of_questions_are_two_distributions() -> None:
    bnn = bayesify(tiny("BertForQuestionAnswering"), members=K, init_scale=0.5)
    ids = torch.randint(3, 30, (B, 7))
    members = [bnn.merge(k)(ids) for k in range(K)]
    output, found = bnn(ids), bnn.predict(ids)
    for side, name in enumerate(("start_logits", "end_logits")):
        p = torch.stack([member[name].softmax(-1) for member in members]).mean(0)
        torch.testing.assert_close(output[name].exp(), p)
        torch.testing.assert_close(found.probs[:, side], p)
    y = torch.randint(7, (B, 2))
    log_probs = torch.stack([output.start_logits, output.end_logits], 1)
    torch.testing.assert_close(found.nll(y), F.nll_loss(log_probs.flatten(0, 1), y.flatten()))
    named = {"input_ids": ids, "start_positions": y[:, 0], "end_positions": y[:, 1]}
    for batch in (named, {"input_ids": ids, "labels": y}):
        measured = evaluate(bnn, [batch]).metrics["bayesian"]["nll"]
        assert measured == pytest.approx(float(found.nll(y)), rel=1e-5)


def test_objects_have_no_mean() -> None:
    bnn = bayesify(tiny("YolosForObjectDetection"), members=2, init_scale=0.5)
    pixels = torch.randn(B, 3, 32, 32)
    output = bnn(pixels)
    for k in range(2):
        alone = bnn.merge(k)(pixels)
        torch.testing.assert_close(output.logits[k * B : (k + 1) * B], alone.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(output.pred_boxes[k * B : (k + 1) * B], alone.pred_boxes, atol=1e-5, rtol=1e-4)
    with pytest.raises(DataError, match="no mixture of these outputs"):
        bnn.predict(pixels)


def test_every_member_sees_the_objects_of_an_image() -> None:
    pytest.importorskip("scipy", reason="transformers matches boxes with scipy")
    bnn = bayesify(tiny("YolosForObjectDetection"), members=2, init_scale=0.5)
    pixels = torch.randn(2, 3, 32, 32)
    labels = [
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])},
        {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.1, 0.1]])},
    ]
    losses = torch.stack([bnn.merge(k)(pixel_values=pixels, labels=labels).loss for k in range(2)])
    torch.testing.assert_close(bnn(pixel_values=pixels, labels=labels).loss, losses.mean(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ refusals


def test_task_is_kept(tmp_path: Path) -> None:
    bnn = network(2 * D, "gaussian")
    bnn.save_pretrained(tmp_path / "model", full=True)
    loaded = from_pretrained(tmp_path / "model", base_model=network(2 * D, "gaussian").unload())
    assert loaded.task == "gaussian"
    x = torch.randn(B, 6)
    torch.testing.assert_close(loaded.predict(x).variance, bnn.predict(x).variance)


@pytest.mark.parametrize(
    ("task", "outputs", "targets", "message"),
    [
        ("classification", (3, B, 5), torch.tensor([0, 1, 5, -100]), "label 5 is out of range"),
        ("classification", (3, B, 5), torch.zeros(B), "integer classes"),
        ("classification", (3, B, 5), torch.zeros(B, 2, dtype=torch.int64), "shape"),
        ("multilabel", (3, B, 5), torch.full((B, 5), 0.5), "0 or 1; found 0.5"),
        ("multilabel", (3, B, 5), torch.zeros(B), "shape"),
        ("regression", (3, B, 5), torch.zeros(B), "shape"),
        ("gaussian", (3, B, 4), torch.zeros(B, 4), r"shape \(4, 2\)"),
        ("gaussian", (3, B, 5), torch.zeros(B, 5), "even number"),
        ("members", (3, B, 5), torch.zeros(B), "no likelihood"),
    ],
)
def test_targets_that_do_not_fit(task: Any, outputs: Any, targets: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TASKS[task].fitted(torch.zeros(outputs), targets)


def test_unknown_task_changes_nothing() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="'clasification'"):
        bayesify(model, task="clasification")  # type: ignore[arg-type]
    assert type(model) is nn.Linear


@pytest.mark.parametrize("task", ["segmentation", "members"])
def test_predictive_holds_arranged_outputs(task: Any) -> None:
    with pytest.raises(DataError, match="arranges"):
        Predictive(torch.zeros(1, 1, 2, 3), task)
