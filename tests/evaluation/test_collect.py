"""Batches of every form, Bayesian and ordinary models, and data that do not fit."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayesify.errors import DataError
from bayesify.evaluation import collect
from bayesify.predictive import Predictive

from .fakes import FakeBayesian, Lookup

INDEX = torch.arange(97)


def loader(targets: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(INDEX, targets), batch_size=40)


def test_bayesian_model_is_asked_batch_by_batch_with_its_own_seed(case: tuple[Predictive, Tensor]) -> None:
    model = FakeBayesian(case[0].outputs).train()
    predictive, labels = collect(model, loader(case[1]), samples=2, member_chunk=1, seed=7, progress=False)
    assert torch.equal(predictive.outputs, case[0].outputs)
    assert labels is not None
    assert torch.equal(labels, case[1])
    expected = {"samples": 2, "member_chunk": 1, "training": False}
    assert model.calls == [{**expected, "seed": seed} for seed in (7, 8, 9)]
    assert model.training


def test_ordinary_network_is_one_member_and_gets_its_modes_back(case: tuple[Predictive, Tensor]) -> None:
    table = case[0].outputs[0, 0]
    model = Lookup(table).train()
    model.frozen.eval()
    predictive, _ = collect(model, loader(case[1]), progress=False)
    assert torch.equal(predictive.outputs, table[None, None])
    assert predictive.task == "classification"
    assert model.training
    assert not model.frozen.training


def test_modes_come_back_after_a_failure(case: tuple[Predictive, Tensor]) -> None:
    model = Lookup(case[0].outputs[0, 0]).train()
    with pytest.raises(IndexError):
        collect(model, [torch.tensor([1000])], progress=False)
    assert model.training


class Logits(nn.Module):
    """Returns its input in the form asked for; takes keywords only, so labels would be refused."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return {"tensor": x, "attribute": SimpleNamespace(logits=x), "mapping": {"logits": x}}[self.form]


@pytest.mark.parametrize("form", ["tensor", "attribute", "mapping"])
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_mapping_batches_and_forms_of_output(form: str, kind: type) -> None:
    x = torch.randn(4, 3)
    batch = kind({"x": x, "labels": torch.tensor([0, 1, 2, 0])})
    predictive, labels = collect(Logits(form), [batch], progress=False)
    assert torch.equal(predictive.outputs[0, 0], x)
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 0]
    assert "labels" in batch  # the caller's batch is left alone


class Sum(nn.Module):
    def forward(self, a: Tensor, rest: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        return a + rest[0] + rest[1]["c"]


def test_several_and_nested_inputs() -> None:
    a, b, c = torch.randn(3, 2, 4)
    predictive, labels = collect(Sum(), [[a, (b, {"c": c}), torch.tensor([3, 0])]], progress=False)
    assert torch.allclose(predictive.outputs[0, 0], a + b + c)
    assert labels is not None
    assert labels.tolist() == [3, 0]


@pytest.mark.parametrize("batch", [INDEX, (INDEX,), [INDEX, None], {"x": INDEX}])
def test_batches_without_labels(case: tuple[Predictive, Tensor], batch: Any) -> None:
    predictive, labels = collect(FakeBayesian(case[0].outputs), [batch], progress=False)
    assert labels is None
    assert torch.equal(predictive.outputs, case[0].outputs)


def test_labels_of_another_label_set_can_be_dropped(case: tuple[Predictive, Tensor]) -> None:
    batches = [(INDEX, case[1] + 1000)]
    with pytest.raises(DataError, match="out of range"):
        collect(FakeBayesian(case[0].outputs), batches, progress=False)
    _, labels = collect(FakeBayesian(case[0].outputs), batches, labeled=False, progress=False)
    assert labels is None


def test_real_labels_make_a_regression() -> None:
    net = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))  # outputs [B]
    predictive, labels = collect(net, [(torch.randn(5, 2), torch.randn(5))], progress=False)
    assert predictive.task == "regression"
    assert predictive.mean.shape == (5, 1)
    assert labels is not None
    assert not predictive.outputs.requires_grad


def test_inputs_follow_the_model_and_results_come_to_the_cpu() -> None:
    net = nn.Linear(2, 3, device="meta")  # refuses to mix with CPU tensors

    class Back(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            assert x.device.type == "meta"
            return torch.zeros(self.net(x).shape)

    predictive, _ = collect(Back(), [torch.randn(4, 2)], progress=False)
    assert predictive.outputs.device.type == "cpu"
    seen = []

    class Anywhere(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.device.type)
            return torch.zeros(x.shape)

    collect(Anywhere(), [torch.randn(4, 2)], device="meta", progress=False)
    assert seen == ["meta"]


def test_progress_bar_goes_to_stderr_and_can_be_off(
    case: tuple[Predictive, Tensor], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    model = FakeBayesian(case[0].outputs)
    collect(model, (batch for batch in loader(case[1])), progress=True, description="reading [b]tea[/b]")
    out, err = capfd.readouterr()
    assert out == ""
    assert "reading [b]tea[/b]" in err
    collect(model, loader(case[1]), progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "empty"),
        ([INDEX[:0]], "every batch is empty"),
        (["text"], "found str"),
        ([()], "found tuple"),
        ([{"labels": torch.tensor([0])}], "no inputs"),
        ([(INDEX, [0, 1])], "labels must be a tensor; found list"),
        ([(INDEX, torch.tensor([0, 1]))], "batch 0 has labels of shape"),
        ([(INDEX, torch.zeros(97, dtype=torch.long)), INDEX], "only 1 of 2 batches"),
        ([(INDEX, torch.full((97,), 5))], "label 5 is out of range"),
    ],
)
def test_data_that_do_not_fit(case: tuple[Predictive, Tensor], batches: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        collect(FakeBayesian(case[0].outputs), batches, progress=False)


class Tokens(nn.Module):
    """Logits [B, T, C] of each token by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


def test_texts_of_different_lengths() -> None:
    torch.manual_seed(0)
    model, ids = Tokens(), torch.randint(7, (4, 6))
    labels = torch.randint(3, (4, 6))
    labels[:2, 4:] = -100
    whole, targets = collect(model, [{"input_ids": ids, "labels": labels}], progress=False)
    short = {"input_ids": ids[:2, :4], "labels": labels[:2, :4]}
    for batches in ([short, {"input_ids": ids[2:], "labels": labels[2:]}],):
        predictive, padded = collect(model, batches, progress=False)
        assert torch.equal(padded, targets)
        assert torch.equal(predictive.nll(padded), whole.nll(targets))
        assert torch.equal(predictive.outputs[:, :, 2:], whole.outputs[:, :, 2:])
    with pytest.raises(DataError, match=r"batch 1 has outputs of shape \(6, 3\).*Give labels, or texts padded"):
        collect(model, [{"input_ids": ids[:2, :4]}, {"input_ids": ids[2:]}], progress=False)


def test_outputs_of_different_sizes() -> None:
    with pytest.raises(DataError, match=r"batch 1 has outputs of shape \(5,\).*the first \(4,\). Give inputs of one"):
        collect(nn.Identity(), [torch.zeros(2, 4), torch.zeros(2, 5)], progress=False)


@pytest.mark.parametrize("output", [(torch.zeros(2, 3),), {"out": torch.zeros(2, 3)}, torch.zeros(2)])
def test_outputs_that_are_no_logits(output: Any) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return output

    with pytest.raises(DataError, match=r"\[batch, classes\]"):
        collect(Odd(), [torch.zeros(2)], progress=False)
