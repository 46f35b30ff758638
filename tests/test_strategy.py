"""How members are computed changes what it costs, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from bayesify import BayesianModel, bayesify, cost
from bayesify.cost import Work, Workload
from bayesify.graph.late import _AtCall
from bayesify.strategy import Strategy

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}


class Skipping(nn.Module):
    """What all members share is added to what they do not, in the network's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(x + self.body(x))


def resnet() -> tuple[nn.Module, Any]:
    return timm.create_model("resnet18", num_classes=5), torch.randn(4, 3, 32, 32)


def vit() -> tuple[nn.Module, Any]:
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes), torch.randn(4, 3, 32, 32)


def bert() -> tuple[nn.Module, Any]:
    model = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=50, num_labels=3))
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 4 + [0], [1] * 5])
    ids = torch.randint(50, (4, 5))
    return model, {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1, 1])}


def llama() -> tuple[nn.Module, Any]:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=50, use_cache=False))
    mask = torch.tensor([[1] * 5, [0] * 2 + [1] * 3])
    return model, {"input_ids": torch.randint(50, (2, 5)), "attention_mask": mask}


def skipping() -> tuple[nn.Module, Any]:
    return Skipping(), torch.randn(4, 6)


CASES = {
    "resnet": (resnet, ("layer4", "fc"), "layer4.0.conv1"),
    "vit": (vit, ("blocks.2", "head"), "blocks.2"),
    "bert": (bert, ("bert.encoder.layer.2", "classifier"), "bert.encoder.layer.2.attention.self"),
    "llama": (llama, ("model.layers.2",), "model.layers.2"),
    "skipping": (skipping, ("head",), "head"),
}


def call(bnn: nn.Module, inputs: Any) -> Any:
    return bnn(**inputs) if isinstance(inputs, dict) else bnn(inputs)


def values(output: Any) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {"logits": output}
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def made(name: str, **options: Any) -> tuple[BayesianModel, Any]:
    torch.manual_seed(0)
    model, inputs = CASES[name][0]()
    options = {"members": 4, "init_scale": 0.3, **options}
    return bayesify(model, **options).eval(), inputs


def only(bnn: BayesianModel) -> Strategy:
    (strategy,) = bnn.passes.strategies._known.values()
    return strategy


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [1, 2])
def test_members_one_after_the_other(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bnn, inputs = made(name)
    rows: list[int] = []
    hook = next(layer for _, layer in bnn.layers()).register_forward_hook(lambda m, args, out: rows.append(len(out)))
    with torch.no_grad():
        monkeypatch.setattr(Workload, "members_at_once", lambda *_: 4)
        expected = values(call(bnn, inputs))
        together, rows[:] = rows[-1], []
        monkeypatch.setattr(Workload, "members_at_once", lambda *_: count)
        found = values(call(bnn, inputs))
    hook.remove()
    assert rows == [together * count // 4] * (4 // count)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_members_part_late(name: str) -> None:
    _, include, at = CASES[name]
    bnn, inputs = made(name, include=include)
    early = copy.deepcopy(bnn)
    early.passes.strategies.of = lambda *_: Strategy()  # type: ignore[method-assign]
    called: list[int] = []
    trunk = next(m for n, m in bnn.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    trunk.register_forward_hook(lambda m, args, out: called.append(len(out)))
    with torch.no_grad():
        call(bnn, inputs)
        called.clear()
        found = values(call(bnn, inputs))
        torch.testing.assert_close(found, values(call(early, inputs)), rtol=1e-5, atol=1e-6)
    assert only(bnn).cut is not None
    assert only(bnn).cut.at == at
    batch = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
    assert set(called) == {batch}

    plain = {n: v for n, v in inputs.items() if n != "labels"} if isinstance(inputs, dict) else inputs
    drawn = [
        (b.predict(**plain, **o) if isinstance(plain, dict) else b.predict(plain, **o)).outputs
        for b in (bnn, early)
        for o in [{"samples": 2, "seed": 3}]
    ]
    torch.testing.assert_close(*drawn, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_members_part_late_in_training(name: str) -> None:
    bnn, inputs = made(name, include=CASES[name][1])
    for module in bnn.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # masks of the shared part are shared, too
    early = copy.deepcopy(bnn)
    early.passes.strategies.of = lambda *_: Strategy()  # type: ignore[method-assign]
    results = []
    for model in (bnn, early):
        model.train()
        for norm in model.model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
        call(model, inputs)
        torch.manual_seed(1)
        output = values(call(model, inputs))
        (output["logits"] * torch.linspace(-1, 1, output["logits"].numel()).view_as(output["logits"])).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((output, grads))
    assert only(bnn).cut is not None
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_what_is_shared_may_not_meet_what_is_not() -> None:
    bnn, inputs = made("skipping", include=("body",))
    with torch.no_grad():
        found = bnn(inputs)
    assert only(bnn).cut is None
    expected = torch.stack([bnn.merge(k)(inputs) for k in range(4)]).log_softmax(-1).logsumexp(0)
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), rtol=1e-5, atol=1e-6)


def test_a_cut_that_changes_values_is_given_up() -> None:
    class Centered(Skipping):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.head(x) + self.stem(x.new_ones(6)).sum() * (self.rows(x) == 4)

        def rows(self, x: Tensor) -> int:
            return x.shape[0]

    torch.manual_seed(0)
    bnn = bayesify(Centered(), include=("head",), members=4, task="regression").eval()
    x = torch.randn(4, 6)
    with torch.no_grad():
        found = bnn(x)
        strategy = only(bnn)
        assert strategy.cut is None
        assert any("part" in note for note in bnn.report.notes)
        torch.testing.assert_close(bnn(x), found)


def test_copies_part_by_themselves_and_unloading_leaves_nothing() -> None:
    bnn, inputs = made("resnet", include=CASES["resnet"][1])
    with torch.no_grad():
        expected = bnn(inputs)
        twin = copy.deepcopy(bnn)
        torch.testing.assert_close(twin(inputs), expected)
        bnn.passes.parting.remove()
        torch.testing.assert_close(twin(inputs), expected)
        torch.testing.assert_close(bnn(inputs), expected)
    for network in (bnn.merge(0), bnn.unload()):
        hooks = [h for module in network.modules() for h in module._forward_pre_hooks.values()]
        assert not any(isinstance(hook, _AtCall) for hook in hooks)


def test_a_cache_among_the_outputs_keeps_members_together(monkeypatch: pytest.MonkeyPatch) -> None:
    bnn, inputs = made("llama", include=CASES["llama"][1])
    monkeypatch.setattr(Workload, "members_at_once", lambda *_: 1)
    with torch.no_grad():
        output = bnn(**inputs, use_cache=True)
    assert output.past_key_values.layers[0].keys.shape[0] == 8
    assert only(bnn).cut is None


def test_costs_decide() -> None:
    heavy = Workload({"a": Work(1, 10_000_000, 1000, 1000, 10_000_000)}, {})
    wide = Workload({"a": Work(1, 100, 4_000_000, 4_000_000, 100_000_000)}, {})
    assert heavy.members_at_once(4, 1, single=True) == 4
    assert wide.members_at_once(4, 8, single=True) == 1
    shared = Workload(wide.sites, {"trunk": Work(100, 1000, 1e7, 1e7, 1e12)})
    assert shared.members_at_once(4, 8, single=True) == 4
    loud = Workload(wide.sites, {}, outputs=1e9)
    assert loud.members_at_once(4, 8, single=True) == 4, "outputs would be joined"
    level = Workload({"a": Work(1, 0, 0, 0, 1e12, factors=False)}, {})
    assert level.members_at_once(4, 8, single=True) == 1, "which takes the least memory"


def test_choices_are_remembered_for_as_many_sizes_as_memory_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_REMEMBERED", 3)
    workload = Workload({"a": Work(1, 100, 4_000_000, 4_000_000, 100_000_000)}, {})
    sizes = [1, 8, 1, 2, 3, 4, 8, 1]
    first = [Workload(workload.sites, {}).members_at_once(4, size, single=True) for size in sizes]
    assert [workload.members_at_once(4, size, single=True) for size in sizes] == first
    assert len(workload._at_once) <= 3
    seconds = Workload.seconds
    calls: list[float] = []
    monkeypatch.setattr(Workload, "seconds", lambda *a, **k: calls.append(a[3]) or seconds(*a, **k))
    workload.members_at_once(4, 1, single=True)
    assert not calls
    workload.members_at_once(4, 1, single=False)
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("first", ["whole", "padded", "training"])
def test_a_cut_that_only_padding_shows_to_be_none_is_given_up(first: str) -> None:
    """transformers looks at the values of masks: without padding it makes none."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ElectraConfig(vocab_size=96, embedding_size=16, **sizes)
    bnn = bayesify(ElectraForSequenceClassification(config).eval(), members=3, init_scale=0.3)
    ids, mask = torch.randint(5, 90, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    if first == "whole":
        bnn(input_ids=ids, attention_mask=mask)
        assert not bnn.report.notes
    mask[1, 3:] = 0
    if first == "training":
        bnn.train()(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
    outputs = bnn.eval().predict(input_ids=ids, attention_mask=mask).outputs
    assert "could not part at 'electra.embeddings_project'" in bnn.report.notes[-1]
    for k in range(3):
        expected = bnn.merge(k)(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(outputs[k, 0], expected)
    with pytest.raises(IndexError):
        bnn(input_ids=ids + 96)


def test_a_cut_outlives_calls_that_fail_for_other_reasons() -> None:
    bnn = bayesify(timm.create_model("test_resnet", num_classes=3), members=2, sites="head").eval()
    x = torch.randn(2, 3, 32, 32)
    bnn.predict(x)
    with pytest.raises(RuntimeError):
        bnn.predict(x[:, :1])
    strategy = bnn.passes.strategies.of((x,), {})
    assert strategy.cut is not None
    assert not bnn.report.notes
