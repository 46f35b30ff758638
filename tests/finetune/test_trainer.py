"""The fine-tuner: what trains, what is written, and that an interrupted run is the same run."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import alone_and_together
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bayesify import BayesianModel, ConfigError, DataError, FormatError, TrainingError, bayesify
from bayesify.finetune import FineTuneConfig, FineTuner, FineTuneResult
from bayesify.finetune.batches import RankBatches
from bayesify.finetune.checkpoint import load_checkpoint, save_checkpoint
from bayesify.finetune.groups import make_optimizer, parameter_groups, select_trained

N, D, C = 24, 6, 3


class Net(nn.Module):
    """A body with a norm, perhaps dropout, and a head that says what it is."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Linear(D, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, C)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.body(x)).relu()))


def network(dropout: float = 0.0, **options: Any) -> BayesianModel:
    torch.manual_seed(0)
    return bayesify(Net(dropout), **{"members": 2, "posterior_scale": 0.05, **options})


def data(length: int = N, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(length, D, generator=generator)
    return TensorDataset(x, (x[:, :C] + 0.1).argmax(1))


def tune(
    model: nn.Module, output: Path | None = None, examples: Dataset[Any] | None = None,
    validation: Dataset[Any] | None = None, resume: bool = False, **options: Any,
) -> FineTuneResult:  # fmt: skip
    config = FineTuneConfig(**{"epochs": 2, "batch_size": 4, "log_every": 1, **options})
    tuner = FineTuner(
        model, data() if examples is None else examples, validation, config, output=output, progress=False
    )
    return tuner.fit(resume=resume)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class FailsAfter(Dataset[Any]):
    """The data, until some number of examples has been read."""

    def __init__(self, reads: int, value: float | None = None) -> None:
        self.base, self.left, self.value = data(), reads, value

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        x, y = self.base[index]
        if self.left >= 0:
            return x, y
        if self.value is None:
            raise KeyboardInterrupt
        return torch.full_like(x, self.value), y


# ------------------------------------------------------------------------------------------------ what trains


def test_training_lowers_the_loss_and_moves_everything() -> None:
    bnn = network()
    before = state_of(bnn)
    result = tune(bnn, epochs=20, learning_rate=1e-2)
    assert result.steps == 120
    first, last = ([row["nll"] for row in rows] for rows in (result.history[:6], result.history[-6:]))
    assert sum(last) < 0.5 * sum(first)
    assert not any(torch.equal(value, before[name]) for name, value in bnn.state_dict().items())
    assert not bnn.training


def test_parameter_groups_decay_slow_matrices_only() -> None:
    bnn = network()
    names = {id(p): name for name, p in bnn.model.named_parameters()}
    config = FineTuneConfig(learning_rate=1e-3, factor_lr_multiplier=7.0, weight_decay=0.1)
    groups = {g["name"]: g for g in parameter_groups(bnn, config)}
    members = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    assert members["kernels"] == {"body.weight", "head.weight"}
    assert members["biases"] == {"body.bias", "head.bias"}
    assert members["norms"] == {"norm.weight", "norm.bias"}
    assert members["factors"] == {
        f"{layer}.rank1.weight.{side}.{part}" for layer in ("body", "head") for side in "sr" for part in ("loc", "rho")
    }
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "factors": 0.0, "kernels": 0.1, "biases": 0.0, "norms": 0.0,
    }  # fmt: skip
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {"factors": 7e-3, "kernels": 1e-3, "biases": 1e-3, "norms": 1e-3}
    )


def test_training_factors_freezes_slow_weights_but_the_head() -> None:
    bnn = network()
    before = state_of(bnn.model)
    tune(bnn, train="factors")
    after = state_of(bnn.model)
    for name in before:
        frozen = name in ("body.weight", "body.bias", "norm.weight", "norm.bias")
        assert torch.equal(after[name], before[name]) == frozen, name
    assert bnn.model.body.weight.grad is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"head.weight", "head.bias"}),
        ({"norms_and_biases": True}, {"head.weight", "head.bias", "body.bias", "norm.weight", "norm.bias"}),
        ({"train_also": "norm"}, {"head.weight", "head.bias", "norm.weight", "norm.bias"}),
        ({"train_also": ("*.weight",)}, {"head.weight", "head.bias", "norm.weight", "body.weight"}),
    ],
    ids=["head", "norms-and-biases", "by-name", "by-glob"],
)
def test_selection_of_slow_weights(options: dict[str, Any], expected: set[str]) -> None:
    bnn = network()
    select_trained(bnn, FineTuneConfig(train="factors", **options))
    assert {name for name, p in bnn.slow_parameters() if p.requires_grad} == expected
    assert all(p.requires_grad for _, _, factor in bnn.factors() for p in factor.parameters())


def test_pattern_of_train_also_without_a_match() -> None:
    bnn = network()
    with pytest.raises(ConfigError, match=r"train_also='nrom' matches no weight. Nearest names: norm"):
        tune(bnn, train="factors", train_also="nrom")
    assert all(p.requires_grad for p in bnn.parameters())


def test_plain_network_trains_under_the_same_loop() -> None:
    torch.manual_seed(0)
    model = Net()
    before = state_of(model)
    result = tune(model, validation=data(8, seed=2))
    assert result.best_nll is not None
    assert all(row["kl"] == 0.0 for row in result.history if "kl" in row)
    assert not same(state_of(model), before)


def test_accumulation_equals_a_larger_batch() -> None:
    runs = []
    for options in ({"batch_size": 32}, {"batch_size": 16, "accumulation": 2}):
        bnn = network(posterior="deterministic")
        result = tune(bnn, examples=data(96), epochs=2, learning_rate=1e-2, **options)
        runs.append((result, state_of(bnn)))
    assert runs[0][0].steps == runs[1][0].steps == 6
    for first, second in zip(runs[0][0].history, runs[1][0].history, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
        assert first["gradient_norm"] == pytest.approx(second["gradient_norm"], rel=1e-4)
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [0.01, None], ids=["clipped", "free"])
def test_clipping_bounds_the_first_step(clip: float | None) -> None:
    """The first step of SGD with Nesterov momentum 0.9 is 1.9 · learning rate · gradient."""
    bnn = network(posterior="deterministic")
    before = state_of(bnn)
    result = tune(
        bnn, steps=1, optimizer="sgd", learning_rate=0.1, factor_lr_multiplier=1.0, weight_decay=0.0,
        warmup=0.0, clip_norm=clip,
    )  # fmt: skip
    moved = math.sqrt(sum(float((value - before[name]).square().sum()) for name, value in state_of(bnn).items()))
    norm = result.history[0]["gradient_norm"]
    assert norm > 0.05, "the norm before clipping"
    assert moved == pytest.approx(1.9 * 0.1 * (norm if clip is None else clip), rel=1e-3)


def test_learning_rates_follow_warm_up_and_cosine() -> None:
    result = tune(network(), steps=10, warmup=0.2, learning_rate=1e-2, factor_lr_multiplier=5.0)
    slow = [row["learning_rate"]["kernels"] for row in result.history]
    fast = [row["learning_rate"]["factors"] for row in result.history]
    expected = [1e-2 * min((t + 1) / 2, 0.5 * (1 + math.cos(math.pi * max(t - 1, 0) / 8))) for t in range(10)]
    assert slow == pytest.approx(expected, abs=1e-8)
    assert fast == pytest.approx([5 * rate for rate in slow])


def test_kl_is_annealed_over_a_fraction_of_the_steps() -> None:
    result = tune(network(), steps=10, kl_annealing=0.4)
    assert [row["kl_weight"] for row in result.history] == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 7])
    for row in result.history:
        assert row["loss"] == pytest.approx(row["nll"] + row["kl_weight"] * row["kl"] / N, rel=1e-5)


def test_partitioned_training_gives_each_member_its_share() -> None:
    bnn = network(members=4, posterior="deterministic")
    twin = copy.deepcopy(bnn)
    x, y = data(8).tensors
    result = tune(bnn, examples=data(8), steps=1, batch_size=8, expand="partition")
    assert bnn.expansion == "replicate", "only while it trains"
    order = next(iter(RankBatches(8, 8, rank=0, world=1, seed=0)))
    logits = twin.predict(x[order]).outputs[:, 0]
    shares = [nn.functional.cross_entropy(logits[k, 2 * k : 2 * k + 2], y[order][2 * k : 2 * k + 2]) for k in range(4)]
    assert result.history[0]["nll"] == pytest.approx(float(sum(shares) / 4), rel=1e-5)


# ------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("reads", [26, 62], ids=["within-an-epoch", "in-the-next"])
def test_interrupted_run_is_the_same_run(tmp_path: Path, reads: int) -> None:
    """With dropout, noise, a validation set, and checkpoints that do not fall on epochs."""
    options = {"validation": data(8, seed=2), "eval_every": 4, "epochs": 3, "eval_samples": 2, "learning_rate": 1e-2}
    whole = network(dropout=0.3)
    expected = tune(whole, tmp_path / "whole", **options)
    broken = network(dropout=0.3)
    with pytest.raises(KeyboardInterrupt):
        tune(broken, tmp_path / "broken", examples=FailsAfter(reads), **options)
    assert len(log_of(tmp_path / "broken")) > 4
    resumed = network(dropout=0.3)
    torch.manual_seed(77)
    found = tune(resumed, tmp_path / "broken", resume=True, **options)
    assert without_time(found.history) == without_time(expected.history)
    assert without_time(log_of(tmp_path / "broken")) == without_time(log_of(tmp_path / "whole"))
    assert (found.best_nll, found.best_step) == (expected.best_nll, expected.best_step)
    assert same(state_of(resumed), state_of(whole))


def test_finished_run_resumes_to_the_same_state(tmp_path: Path) -> None:
    bnn = network()
    expected = tune(bnn, tmp_path, validation=data(8, seed=2))
    again = network()
    found = tune(again, tmp_path, validation=data(8, seed=2), resume=True)
    assert same(state_of(again), state_of(bnn))
    assert without_time(found.history) == without_time(expected.history)


def test_log_with_an_unfinished_line_resumes(tmp_path: Path) -> None:
    tune(network(), tmp_path, steps=4, eval_every=2)
    lines = log_of(tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    tune(network(), tmp_path, steps=4, eval_every=2, resume=True)
    assert log_of(tmp_path) == lines


def test_same_seed_same_run_and_another_seed_another() -> None:
    runs = [tune(network(dropout=0.3), seed=seed).history for seed in (3, 3, 4)]
    assert without_time(runs[0]) == without_time(runs[1])
    assert without_time(runs[0]) != without_time(runs[2])


def test_validation_changes_nothing_about_training() -> None:
    plain = tune(network(dropout=0.3)).history
    watched = tune(network(dropout=0.3), validation=data(8, seed=2), eval_every=1, eval_samples=2).history
    assert without_time([row for row in watched if "loss" in row]) == without_time(plain)


def test_best_state_is_restored() -> None:
    bnn = network()
    validation = data(16, seed=2)
    # A rate so large that the last state is not the best one.
    config = FineTuneConfig(epochs=8, batch_size=4, learning_rate=0.2, eval_every=1, clip_norm=None, log_every=1)
    tuner = FineTuner(bnn, data(), validation, config, progress=False)
    result = tuner.fit()
    scores = {row["step"]: row["validation_nll"] for row in result.history if "validation_nll" in row}
    assert result.best_nll == min(scores.values())
    assert scores[result.best_step or 0] == result.best_nll
    assert scores[result.steps] > result.best_nll, "the last state is worse"
    assert tuner.validate()["validation_nll"] == pytest.approx(result.best_nll, rel=1e-6)
    x, y = validation.tensors
    assert float(bnn.predict(x).nll(y)) == pytest.approx(result.best_nll, rel=1e-5)


# ------------------------------------------------------------------------------------------------ files


def test_log_and_checkpoint_hold_what_they_should(tmp_path: Path) -> None:
    bnn = network()
    result = tune(bnn, tmp_path, validation=data(8, seed=2), epochs=2, log_every=2, eval_every=3)
    rows = log_of(tmp_path)
    assert rows == result.history
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "validation_nll" in row] == [3, 6, 9, 12]
    numbers = {"step", "loss", "nll", "kl", "kl_weight", "gradient_norm", "learning_rate", "seconds"}
    assert all(set(row) in (numbers, {"step", "validation_nll", "validation_accuracy"}) for row in rows)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "log.jsonl", "checkpoint/checkpoint.json", "checkpoint/model.safetensors",
        "checkpoint/optimizer.safetensors", "checkpoint/best.safetensors",
    }  # fmt: skip
    for path in tmp_path.rglob("*.safetensors"):
        assert load_file(path)
        assert b"pickle" not in path.read_bytes()
    content = json.loads((tmp_path / "checkpoint" / "checkpoint.json").read_text())
    assert content["progress"]["step"] == 12
    assert content["progress"]["run"]["examples"] == N


def test_frozen_weights_are_not_in_the_checkpoint(tmp_path: Path) -> None:
    tune(network(), tmp_path, train="factors", steps=2)
    names = set(load_file(tmp_path / "checkpoint" / "model.safetensors"))
    assert "model.head.weight" in names
    assert "model.body.rank1.weight.s.loc" in names
    assert not names & {"model.body.weight", "model.norm.weight"}


def test_what_is_no_data_set_or_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a FineTuneConfig; found dict"):
        FineTuner(network(), data(), None, {"epochs": 1})  # type: ignore[arg-type]
    for kind in (DataLoader(data()), iter(data())):
        with pytest.raises(DataError, match=r"map-style data set.*found"):
            FineTuner(network(), kind)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be a Rank1Config; found int"):
        bayesify(Net(), 4)  # type: ignore[arg-type]


def test_weights_in_halves_are_not_trained() -> None:
    torch.manual_seed(0)
    bnn = bayesify(Net().half(), members=2)
    before = state_of(bnn)
    with pytest.raises(ConfigError, match=r"weight is float16.*model\.float\(\)"):
        tune(bnn)
    assert same(state_of(bnn), before)


class Root(nn.Module):
    """A network whose loss stays finite where its gradient does not: at the root of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + (x[:, :1] * self.net.head.bias[0]).abs().sqrt()


@pytest.mark.parametrize("clip", [1.0, None], ids=["clipped", "free"])
def test_gradient_that_is_not_finite_stops_before_it_is_taken(clip: float | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    bnn = bayesify(Root(), members=2)
    examples = data(8)
    examples.tensors[0][6:] = 0.0
    with pytest.raises(TrainingError, match=r"the gradient is not finite at step \d .*is kept"):
        tune(bnn, tmp_path, examples=examples, batch_size=1, steps=8, eval_every=1, clip_norm=clip)
    assert all(torch.isfinite(p).all() for p in bnn.parameters())
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "checkpoint" / "model.safetensors").values())


def test_a_validation_without_a_number_is_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([math.nan, 1.2, 1.1, math.inf])
    monkeypatch.setattr(FineTuner, "validate", lambda self: {"validation_nll": next(scores)})
    result = tune(network(), validation=data(8, seed=2), steps=4, eval_every=1)
    assert (result.best_nll, result.best_step) == (1.1, 3)


def test_a_weight_of_the_kl_that_another_loop_left_is_not_added_as_well() -> None:
    left, clean = network(), network()
    left.kl_weight = 0.5
    assert without_time(tune(left).history) == without_time(tune(clean).history)
    assert left.kl_weight == 0.0


def test_the_same_tuner_goes_on_with_one_optimizer(tmp_path: Path) -> None:
    config = FineTuneConfig(steps=2, batch_size=4)
    tuner = FineTuner(network(), data(), None, config, output=tmp_path, progress=False)
    tuner.fit()
    assert tuner.accelerator._optimizers == []
    assert tuner.fit(resume=True).steps == 2


def test_no_checkpoint_is_promised_before_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the loss is nan at step 1 ") as caught:
        tune(network(), tmp_path, examples=FailsAfter(0, math.nan), eval_every=2)
    assert "checkpoint" not in str(caught.value)


def test_loss_that_is_not_finite_stops_with_the_last_checkpoint_kept(tmp_path: Path) -> None:
    bnn = network()
    with pytest.raises(TrainingError, match=r"the loss is nan at step 6 .*Its batch holds NaN.*is kept"):
        tune(bnn, tmp_path, examples=FailsAfter(22, math.nan), eval_every=2)
    assert all(torch.isfinite(p).all() for p in bnn.parameters())
    content = json.loads((tmp_path / "checkpoint" / "checkpoint.json").read_text())
    assert content["progress"]["step"] == 4
    resumed, whole = network(), network()
    found = tune(resumed, tmp_path, eval_every=2, resume=True)
    assert without_time(found.history) == without_time(tune(whole, eval_every=2).history)
    assert same(state_of(resumed), state_of(whole))


def _truncate(name: str) -> Any:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return spoil


def _content(**changes: Any) -> Any:
    def spoil(folder: Path) -> None:
        path = folder / "checkpoint.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def _foreign(name: str) -> Any:
    return lambda folder: save_file({"0.weight": torch.ones(3)}, folder / name)


def _reshaped(name: str, key: str) -> Any:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / name)
        save_file({**tensors, key: torch.ones(3, 3)}, folder / name)

    return spoil


def _two_processes(folder: Path) -> None:
    progress = json.loads((folder / "checkpoint.json").read_text())["progress"]
    run = {**progress["run"], "processes": 2}
    _content(progress={**progress, "random": progress["random"] * 2, "run": run})(folder)


SPOILED: dict[str, tuple[Any, str]] = {
    "no-json": (lambda folder: (folder / "checkpoint.json").unlink(), "checkpoint.json: not found"),
    "no-model": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: not found"),
    "truncated-json": (_truncate("checkpoint.json"), "checkpoint.json: truncated or not JSON"),
    "truncated-model": (_truncate("model.safetensors"), "model.safetensors: truncated"),
    "truncated-optimizer": (_truncate("optimizer.safetensors"), "optimizer.safetensors: truncated"),
    "truncated-best": (_truncate("best.safetensors"), "best.safetensors: truncated"),
    "json-list": (lambda f: (f / "checkpoint.json").write_text("[1]"), "expected a JSON object; found list"),
    "json-empty": (lambda f: (f / "checkpoint.json").write_text("{}"), "format None; expected 1"),
    "newer-format": (_content(format=2), "format 2; expected 1"),
    "no-progress": (_content(progress={}), "checkpoint"),
    "no-scalars": (_content(scalars=None), "damaged"),
    "other-groups": (_content(groups=[]), "0 parameter groups; expected 4"),
    "other-model": (_foreign("model.safetensors"), "does not belong to this model"),
    "other-best": (_foreign("best.safetensors"), "best.safetensors: does not belong to this model"),
    "other-optimizer": (_foreign("optimizer.safetensors"), "damaged|optimizer.safetensors"),
    "reshaped-model": (_reshaped("model.safetensors", "model.head.weight"), r"has shape \(3, 3\); expected \(3, 8\)"),
    "reshaped-optimizer": (_reshaped("optimizer.safetensors", "0.exp_avg"), r"has shape \(3, 3\)"),
    "other-processes": (_two_processes, "written with processes=2; found 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_checkpoint_is_an_error_that_changes_nothing(tmp_path: Path, name: str) -> None:
    spoil, message = SPOILED[name]
    options = {"validation": data(8, seed=2), "steps": 2, "expand": "partition"}
    tune(network(), tmp_path, **options)
    spoil(tmp_path / "checkpoint")
    bnn = network()
    with torch.no_grad():
        for parameter in bnn.parameters():
            parameter += 1
    before = state_of(bnn)
    with pytest.raises(FormatError, match=message):
        tune(bnn, tmp_path, resume=True, **options)
    assert same(state_of(bnn), before)
    assert bnn.expansion == "replicate"


@pytest.mark.parametrize(
    "options", [{"kl_reduction": "sum"}, {"prior_scale": 0.3}, {"noise": "member"}, {"members": 3}], ids=str
)
def test_resuming_with_another_conversion_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    """Options that change no parameter, only what is trained for, and one that changes them all."""
    tune(network(), tmp_path, steps=2)
    with pytest.raises(FormatError, match="was written with rank1="):
        tune(network(**options), tmp_path, resume=True, steps=2)


@pytest.mark.parametrize(
    "options",
    [{"train": "factors"}, {"likelihood": "mixture"}, {"expand": "partition"}, {"train_samples": 2}],
    ids=str,
)
def test_a_plain_network_takes_no_options_of_members(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="has no meaning for a network that is not Bayesian"):
        tune(Net(), **options)


def test_resuming_without_an_output_folder() -> None:
    with pytest.raises(FormatError, match="needs the output folder"):
        tune(network(), resume=True)


def test_resuming_after_a_crash_between_the_two_moves_of_a_save(tmp_path: Path) -> None:
    bnn = network()
    tune(bnn, tmp_path, steps=2)
    (tmp_path / "checkpoint").rename(tmp_path / ".checkpoint.old")
    resumed = network()
    tune(resumed, tmp_path, steps=2, resume=True)
    assert same(state_of(resumed), state_of(bnn))


def test_a_save_after_such_a_crash_keeps_the_only_checkpoint_until_it_has_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bnn = network()
    tune(bnn, tmp_path, steps=2)
    (tmp_path / "checkpoint").rename(tmp_path / ".checkpoint.old")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "checkpoint", bnn, make_optimizer(bnn, FineTuneConfig()), {}, {})
    assert (tmp_path / ".checkpoint.old" / "checkpoint.json").is_file()


def test_a_resumed_run_holds_no_file_of_its_checkpoint(tmp_path: Path) -> None:
    validation = data(8, seed=2)
    tune(network(), tmp_path, validation=validation, steps=2)
    config = FineTuneConfig(epochs=2, steps=2, batch_size=4)
    tuner = FineTuner(network(), data(), validation, config, output=tmp_path)
    optimizer = make_optimizer(tuner.model, config)
    _, best = load_checkpoint(tuner.checkpoint, tuner.model, optimizer, tuner._run())
    assert best
    assert optimizer.state
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) not in maps.read_text()


# ------------------------------------------------------------------------------------------------ data that do not fit


@pytest.mark.parametrize("length", [3, 2], ids=["not-a-multiple", "smaller-than-the-members"])
def test_batch_that_members_cannot_share(length: int) -> None:
    bnn = network(members=4)
    before = state_of(bnn)
    with pytest.raises(DataError, match=rf"4 members can share; found {length}\s+examples.*multiple of 4"):
        tune(bnn, batch_size=length, expand="partition")
    assert same(state_of(bnn), before)
    assert bnn.expansion == "replicate"


@pytest.mark.parametrize("label", [C, -1])
def test_label_out_of_range_changes_nothing(label: int) -> None:
    bnn = network()
    before = state_of(bnn)
    wrong = TensorDataset(torch.randn(4, D), torch.tensor([0, 1, label, 2]))
    with pytest.raises(DataError, match=rf"label {label} is out of range: the model has 3 classes"):
        tune(bnn, examples=wrong)
    assert same(state_of(bnn), before)


def test_empty_data() -> None:
    class Empty(Dataset[Any]):
        def __len__(self) -> int:
            return 0

    with pytest.raises(DataError, match="training data set is empty"):
        tune(network(), examples=Empty())
    with pytest.raises(DataError, match="validation data set is empty"):
        tune(network(), validation=Empty())


def test_data_without_labels() -> None:
    with pytest.raises(DataError, match="no labels"):
        tune(network(), examples=TensorDataset(torch.randn(8, D)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a positive integer; found 0"),
        ({"batch_size": 1.5}, "batch_size must be a positive integer; found 1.5"),
        ({"optimizer": "lamb"}, "optimizer='lamb' is unknown; expected one of 'adamw', 'sgd'"),
        ({"warmup": 2.0}, "warmup must be a fraction of the steps"),
        ({"learning_rate": 0.0}, "learning_rate must be positive; found 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and not negative"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FineTuneConfig(**options)


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_each_global_batch(world: int) -> None:
    shares = [RankBatches(21, 4, rank=rank, world=world, seed=3) for rank in range(world)]
    alone = RankBatches(21, 4, rank=0, world=1, seed=3)
    for epoch in range(2):
        for sampler in (*shares, alone):
            sampler.epoch = epoch
        together = [[index for part in parts for index in part] for parts in zip(*shares, strict=True)]
        assert together == list(alone)
        seen = [index for part in together for index in part]
        assert len(together) == 5, "the incomplete batch is dropped"
        assert len(set(seen)) == 20
    alone.epoch = 0
    first = list(alone)
    alone.epoch = 1
    assert list(alone) != first
    with pytest.raises(DataError, match="cannot be shared by 3 processes"):
        RankBatches(21, 4, rank=0, world=3, seed=3)


def test_data_set_smaller_than_a_batch_is_one_batch() -> None:
    assert [sorted(b) for b in RankBatches(3, 32, rank=0, world=1, seed=0)] == [[0, 1, 2]]


# ------------------------------------------------------------------------------------------------ several processes


class Idle(Net):
    """A parameter that its forward has no use for, as the mask tokens of many networks."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(3))


def with_an_idle_parameter(folder: Path) -> None:
    torch.manual_seed(0)
    bnn = bayesify(Idle(), members=2, posterior="deterministic")
    tune(bnn, folder, examples=data(16), steps=3, batch_size=8, weight_decay=0.0)
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(state_of(bnn), folder / "state.safetensors")


def both_posteriors(folder: Path) -> None:
    """Two short runs, with everything that can be compared written to a folder by the main process."""
    for posterior in ("deterministic", "normal"):
        # So narrow that the noise, which differs between processes, is nothing, and the KL is most of the loss.
        bnn = network(posterior=posterior, posterior_scale=1e-7, init_scale=0.2)
        result = tune(
            bnn, folder / posterior, examples=data(16), validation=data(7, seed=2), steps=3, batch_size=8,
            optimizer="sgd", learning_rate=1e-2, factor_lr_multiplier=1.0, clip_norm=0.5, kl_annealing=0.0,
        )  # fmt: skip
        if int(os.environ.get("RANK", "0")) == 0:
            save_file(state_of(bnn), folder / f"{posterior}.safetensors")
            (folder / f"{posterior}.json").write_text(json.dumps(without_time(result.history)))


def the_first_alone_resumes(folder: Path) -> None:
    """As on machines without a common file system."""
    tune(network(), folder / "0", steps=2, epochs=None)
    rank = int(os.environ.get("RANK", "0"))
    try:
        tune(network(), folder / str(rank), steps=2, epochs=None, resume=rank == 0)
    except FormatError as error:
        (folder / f"{rank}.txt").write_text(str(error))


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """{run: its folder in one process, and in two}."""
    runs = [with_an_idle_parameter, both_posteriors, the_first_alone_resumes]
    return alone_and_together(runs, tmp_path_factory.mktemp("processes"))


def test_processes_do_not_wait_for_what_is_not_used(processes: dict[str, tuple[Path, Path]]) -> None:
    one, two = (load_file(folder / "state.safetensors") for folder in processes["with_an_idle_parameter"])
    assert torch.equal(two["model.token"], torch.ones(3))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5)


def test_two_processes_equal_one(processes: dict[str, tuple[Path, Path]]) -> None:
    alone, together = processes["both_posteriors"]
    checkpoint = json.loads((together / "normal" / "checkpoint" / "checkpoint.json").read_text())
    assert checkpoint["progress"]["run"]["processes"] == 2
    for posterior in ("deterministic", "normal"):
        one, two = (json.loads((folder / f"{posterior}.json").read_text()) for folder in (alone, together))
        assert [row["step"] for row in one] == [row["step"] for row in two]
        for first, second in zip(one, two, strict=True):
            for name in set(first) - {"learning_rate"}:
                assert second[name] == pytest.approx(first[name], rel=1e-5), f"{posterior}: {name}"
        states = [load_file(folder / f"{posterior}.safetensors") for folder in (alone, together)]
        for name, value in states[0].items():
            torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-5)
    losses = [row["loss"] - row["nll"] for row in one if "loss" in row]
    assert losses[0] == pytest.approx(one[0]["kl"] / 16, rel=1e-5), "the KL counts once"
    assert one[0]["kl"] > 100


def test_processes_that_would_go_on_from_different_steps(processes: dict[str, tuple[Path, Path]]) -> None:
    alone, together = processes["the_first_alone_resumes"]
    assert not (alone / "0.txt").exists()
    for rank in (0, 1):
        assert "from different steps ([2, 0])" in (together / f"{rank}.txt").read_text()


def test_resuming_with_other_options_is_refused(tmp_path: Path) -> None:
    tune(network(), tmp_path, epochs=1, batch_size=8)
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FormatError, match=r"learning_rate=0\.0003; found 0\.01"):
        tune(model, tmp_path, resume=True, epochs=1, batch_size=8, learning_rate=0.01)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fit_leaves_requires_grad_as_it_was() -> None:
    model = network()
    model.model.norm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    tune(model, epochs=1, batch_size=8, train="factors")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_language_models_are_validated_by_their_own_loss() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8, bos_token_id=1, eos_token_id=2)
    bnn = bayesify(GPT2LMHeadModel(small), members=2)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 20, (6, 5))]
    tuner = FineTuner(bnn, rows, rows, FineTuneConfig(batch_size=2), progress=False)  # type: ignore[arg-type]
    scores = tuner.validate()
    log_probs = bnn.predict(torch.stack([row["input_ids"] for row in rows])).member_log_probs[:, 0, :, :-1]
    targets = torch.stack([row["labels"] for row in rows])[None, :, 1:, None].expand(2, -1, -1, -1)
    assert scores == {"validation_nll": pytest.approx(-log_probs.gather(-1, targets).mean().item(), rel=1e-5)}


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}


def questions() -> tuple[Any, list[Any]]:
    """A model that finds answers in texts, and texts with the places of the answers."""
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    ids, places = torch.randint(3, 30, (8, 7)), torch.randint(7, (8, 2))
    rows = [{"input_ids": i, "start_positions": s, "end_positions": e} for i, (s, e) in zip(ids, places, strict=True)]
    return BertForQuestionAnswering(BertConfig(**SMALL, vocab_size=30, max_position_embeddings=16)), rows


def pictures() -> tuple[Any, list[Any]]:
    """A model that finds objects, and pictures with one and with two of them."""
    from transformers import YolosConfig, YolosForObjectDetection

    torch.manual_seed(0)
    model = YolosForObjectDetection(YolosConfig(**SMALL, image_size=[32, 32], num_detection_tokens=4))
    objects = [
        {"class_labels": torch.randint(2, (n,)), "boxes": torch.rand(n, 4) / 2 + 0.2} for n in (1, 2, 2, 1, 1, 2, 1, 1)
    ]
    return model, [{"pixel_values": torch.randn(3, 32, 32), "labels": found} for found in objects]


def collate(rows: list[Any]) -> dict[str, Any]:
    """Labels that are no tensor stay a list."""
    return {
        name: [row[name] for row in rows] if isinstance(rows[0][name], dict) else torch.stack([r[name] for r in rows])
        for name in rows[0]
    }


@pytest.mark.parametrize("make", [questions, pictures])
@pytest.mark.parametrize("plain", [False, True], ids=["bayesian", "plain"])
def test_labels_that_only_the_network_knows(make: Any, plain: bool) -> None:
    pytest.importorskip("scipy", reason="transformers matches boxes with scipy")
    model, rows = make()
    network = model if plain else bayesify(model, members=2, init_scale=0.3)
    config = FineTuneConfig(batch_size=4, epochs=20, learning_rate=3e-3)
    tuner = FineTuner(network, rows, rows, config, collate_fn=collate, progress=False)  # type: ignore[arg-type]
    before = tuner.validate()["validation_nll"]
    with torch.no_grad():
        losses = [network.eval()(**collate(part)).loss.item() for part in (rows[:4], rows[4:])]
    assert before == pytest.approx(sum(losses) / 2, rel=1e-5)
    tuner.fit()
    assert tuner.validate()["validation_nll"] < 0.95 * before


def test_regression_is_validated_by_the_nll_it_trains_on() -> None:
    bnn = network()
    bnn.task = "regression"
    x, y = torch.randn(8, D), torch.randn(8, C)
    tuner = FineTuner(bnn, TensorDataset(x, y), TensorDataset(x, y), FineTuneConfig(batch_size=4), progress=False)
    expected = 0.5 * (bnn.predict(x).mean - y).square().mean() + 0.5 * math.log(2 * math.pi)
    assert tuner.validate() == {"validation_nll": pytest.approx(expected.item(), rel=1e-5)}
