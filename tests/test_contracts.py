"""What a converted network gives back: training rows, the predictive, draws, merging and the report."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import BY_NAME, Case, convert, every_case, some_cases, tensor
from timm.optim import create_optimizer_v2
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bayesify import (
    BayesianModel,
    BayesifyError,
    ConfigError,
    ConversionError,
    DataError,
    Rank1Config,
    Rank1Layer,
    bayesify,
    inspect,
    rank1,
)
from bayesify.layers import registry


def predict(bnn: BayesianModel, case: Case, **options: Any) -> Tensor:
    args, kwargs = case.example()
    return bnn.predict(*args, **kwargs, **options).outputs


def mlp(**options: Any) -> BayesianModel:
    return convert(BY_NAME["mlp"], **{"members": 3, **options}).eval()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


# ------------------------------------------------------------------------------------------------ training and eval


@every_case
def test_training_gives_member_major_rows(case: Case) -> None:
    """Row k·B + i of a training call is member k on example i, in the network's own type of output."""
    bnn = convert(case, members=3, posterior="deterministic")
    expected = predict(bnn, case)[:, 0].flatten(0, 1)
    args, kwargs = case.example()
    original = case.model()(*args, **kwargs)
    bnn.eval().training = True  # rows of training, without dropout or batch statistics
    found = bnn(*args, **kwargs)
    assert type(found) is type(original)
    assert close(tensor(found).detach(), expected)


@every_case
@torch.no_grad()
def test_evaluation_gives_log_of_mean_probability(case: Case) -> None:
    bnn = convert(case, members=3, posterior="deterministic").eval()
    args, kwargs = case.example()
    found = bnn(*args, **kwargs)
    assert type(found) is type(case.model()(*args, **kwargs))
    total = sum(logits.softmax(-1) for logits in predict(bnn, case)[:, 0])
    torch.testing.assert_close(tensor(found).exp(), total / 3, rtol=1e-4, atol=1e-6)


@some_cases("bert", "gpt2", "t5", "vit_hf")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_labels_are_expanded_and_the_loss_is_the_mean_over_members(case: Case, training: bool) -> None:
    bnn = convert(case, members=3, posterior="deterministic").eval()
    bnn.training = training  # rows of training without its dropout
    _, kwargs = case.example()
    logits = predict(bnn, case)[:, 0]
    tokens = kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
    labels = torch.tensor([3, 1]) if case.name in ("bert", "vit_hf") else tokens
    losses = []
    for member in logits:
        if case.name == "gpt2":  # next token, in the model's own code
            losses.append(F.cross_entropy(member[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
        else:
            losses.append(F.cross_entropy(member.flatten(0, -2), labels.flatten()))
    found = bnn(**kwargs, labels=labels)
    torch.testing.assert_close(found.loss.detach(), sum(losses) / 3)
    assert found.logits.shape[0] == (6 if training else 2)


def test_real_outputs_are_averaged() -> None:
    bnn = bayesify(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), members=3, task="regression").eval()
    x = torch.randn(5, 4)
    predictive = bnn.predict(x)
    assert torch.allclose(bnn(x), predictive.outputs[:, 0].mean(0), atol=1e-6)
    assert torch.allclose(predictive.variance, predictive.outputs[:, 0].var(0, unbiased=False), atol=1e-6)


# ------------------------------------------------------------------------------------------------ predict


@every_case
@pytest.mark.parametrize("noise", ["example", "member"])
def test_member_chunk_changes_nothing(case: Case, noise: Any) -> None:
    bnn = convert(case, members=3, noise=noise, posterior_scale=0.1)
    expected = predict(bnn, case, samples=2, seed=5)
    for chunk in (1, 2):
        found = predict(bnn, case, samples=2, seed=5, member_chunk=chunk)
        assert close(found, expected, 2 * case.tolerance)


def test_seed_decides_the_draws() -> None:
    bnn = mlp(posterior_scale=0.2)
    case = BY_NAME["mlp"]
    first = predict(bnn, case, samples=2, seed=1)
    assert torch.equal(predict(bnn, case, samples=2, seed=1), first)
    assert not torch.equal(predict(bnn, case, samples=2, seed=2), first)
    assert not torch.equal(first[:, 0], first[:, 1]), "samples differ"
    torch.testing.assert_close(predict(bnn, case, samples=1, seed=1), first[:, :1])
    args, _ = case.example()
    torch.manual_seed(3)
    unseeded = bnn.predict(*args, samples=2).outputs
    assert not torch.equal(bnn.predict(*args, samples=2).outputs, unseeded)
    torch.manual_seed(3)
    assert torch.equal(bnn.predict(*args, samples=2).outputs, unseeded)


def test_posterior_mean_needs_no_random_numbers() -> None:
    bnn = mlp(posterior_scale=0.2)
    (x,), _ = BY_NAME["mlp"].example()
    state = torch.get_rng_state()
    first = bnn.predict(x).outputs
    assert torch.equal(bnn.predict(x, seed=3).outputs, first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("noise", ["example", "member"])
def test_samples_have_the_posteriors_mean_and_spread(noise: Any) -> None:
    """A network of one weight w = 1 without bias: its output is r · s · x."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    bnn = bayesify(model, members=2, noise=noise, factors="inputs", posterior_scale=0.2, task="regression")
    with torch.no_grad():
        (_, _, factor), *_ = bnn.factors()
        factor.loc.copy_(torch.tensor([[1.0], [3.0]]))
    draws = bnn.predict(torch.ones(4, 1), samples=4000, seed=0).outputs.squeeze(-1)  # [K, S, B]
    means, deviations = draws.mean(1), draws.std(1)
    assert torch.allclose(means, torch.tensor([[1.0], [3.0]]).expand(2, 4), atol=5 * 0.2 / math.sqrt(4000))
    assert torch.allclose(deviations, torch.full((2, 4), 0.2), atol=0.012)
    shared = bool((draws == draws[..., :1]).all())
    assert shared == (noise == "member")
    if noise == "example":
        correlation = torch.corrcoef(draws[0].T)
        assert float((correlation - torch.eye(4)).abs().max()) < 0.08, "rows are independent"


@pytest.mark.parametrize("noise", ["example", "member"])
@every_case
def test_equal_examples_share_a_draw_only_with_noise_per_member(case: Case, noise: Any) -> None:
    bnn = convert(case, members=3, noise=noise, posterior_scale=0.1)
    args, kwargs = case.example()

    def same(value: Any) -> Any:
        return value[:1].expand_as(value).contiguous() if isinstance(value, Tensor) else value

    args, kwargs = tuple(map(same, args)), {name: same(value) for name, value in kwargs.items()}
    found = bnn.predict(*args, **kwargs, samples=1, seed=0).outputs[:, 0]
    assert close(found[:, 1], found[:, 0], 1e-4) == (noise == "member")


def test_mutual_information_is_not_negative_and_zero_without_disagreement() -> None:
    (x,), _ = BY_NAME["mlp"].example()
    predictive = mlp(posterior_scale=0.3).predict(x, samples=3, seed=0)
    assert bool((predictive.mutual_information > 1e-5).all())
    assert bool((predictive.mutual_information <= predictive.entropy).all())
    alike = mlp(init="ones", posterior="deterministic").predict(x)
    assert bool((alike.mutual_information >= 0).all())
    assert float(alike.mutual_information.max()) < 1e-6


def test_predict_keeps_modes_and_needs_no_gradient() -> None:
    bnn = convert(BY_NAME["resnet18"], members=3).train()
    bnn.model.bn1.eval()
    modes = [module.training for module in bnn.modules()]
    statistics = bnn.model.layer1[0].bn1.running_mean.clone()
    assert not predict(bnn, BY_NAME["resnet18"]).requires_grad
    assert [module.training for module in bnn.modules()] == modes
    assert torch.equal(bnn.model.layer1[0].bn1.running_mean, statistics)


@pytest.mark.parametrize(("option", "value"), [("samples", 0), ("member_chunk", 0), ("samples", -1)])
def test_predict_refuses_counts_below_one(option: str, value: int) -> None:
    with pytest.raises(DataError, match=f"{option} must be at least 1; found {value}"):
        mlp().predict(torch.randn(2, 5), **{option: value})


@pytest.mark.parametrize("noise", ["example", "member"])
def test_module_called_twice_uses_one_draw(noise: Any) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.layer(x), self.layer(x)], -1)

    bnn = bayesify(Twice(), members=2, noise=noise, posterior_scale=0.3)
    for found in (bnn.train()(torch.randn(3, 4)), bnn.predict(torch.randn(3, 4), samples=2).outputs):
        once, again = found.chunk(2, -1)
        assert torch.equal(once, again)


def test_each_training_call_draws_anew() -> None:
    bnn = mlp(posterior_scale=0.2).train()
    x = torch.randn(2, 5)
    torch.manual_seed(0)
    first, second = bnn(x), bnn(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(bnn(x), first)


@pytest.mark.parametrize("factors", ["both", "inputs", "outputs"])
def test_factors_option_leaves_the_other_side_at_one(factors: Any) -> None:
    model = nn.Linear(3, 2)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    bnn = bayesify(model, members=2, factors=factors, init_scale=0.3).eval()
    vectors = {side: factor.loc for _, side, factor in bnn.factors()}
    assert set(vectors) == {"both": {"s", "r"}, "inputs": {"s"}, "outputs": {"r"}}[factors]
    x = torch.randn(4, 3)
    for k, found in enumerate(bnn.predict(x).outputs[:, 0]):
        s = vectors["s"][k] if "s" in vectors else torch.ones(3)
        r = vectors["r"][k] if "r" in vectors else torch.ones(2)
        torch.testing.assert_close(found, x @ (weight * torch.outer(r, s)).T + bias)
    assert bnn.report.parameters_added == sum(f.loc.numel() for f in (f for _, _, f in bnn.factors())) * 2


@some_cases("mlp", "cnn", "lstm", "packed_gru")
def test_partition_gives_each_member_its_share(case: Case) -> None:
    bnn = convert(case, members=3, posterior="deterministic")
    args, _ = case.example()
    args = tuple(torch.cat([value] * 3)[:6] for value in args)
    every = bnn.predict(*args).outputs[:, 0]
    bnn.eval().training = True
    bnn.expansion = "partition"
    found = bnn(*args).detach()
    assert found.shape[0] == 6
    for k in range(3):
        assert close(found[2 * k : 2 * k + 2], every[k, 2 * k : 2 * k + 2])


def test_partition_of_a_batch_that_does_not_divide() -> None:
    bnn = mlp(members=3).train()
    bnn.expansion = "partition"
    with pytest.raises(DataError, match="a batch of 4 examples cannot be partitioned among 3 members"):
        bnn(torch.randn(4, 5))


# ------------------------------------------------------------------------------------------------ kl


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_sums_over_sites_and_reduces_over_members(reduction: Any) -> None:
    bnn = mlp(members=3, posterior_scale=0.07, prior_loc=0.9, prior_scale=0.2, kl_reduction=reduction)
    total = torch.zeros(3, dtype=torch.float64)
    for _, _, factor in bnn.factors():
        q = torch.distributions.Normal(factor.loc.double(), factor.scale.double())
        total += torch.distributions.kl_divergence(q, torch.distributions.Normal(0.9, 0.2)).sum(-1)
    expected = total.mean() if reduction == "mean" else total.sum()
    torch.testing.assert_close(bnn.kl().double(), expected, rtol=1e-5, atol=0.0)
    assert bnn.kl().requires_grad


def test_kl_of_an_ensemble_is_zero() -> None:
    assert mlp(posterior="deterministic").kl().item() == 0.0


# ------------------------------------------------------------------------------------------------ merge and unload


@every_case
@torch.no_grad()
def test_merge_is_that_member_as_a_plain_network(case: Case) -> None:
    bnn = convert(case, members=3).eval()
    before = predict(bnn, case)
    if not case.merges:
        with pytest.raises(ConversionError, match="cannot be folded"):
            bnn.merge(1)
        assert torch.equal(predict(bnn, case), before)
        return
    original = case.model()
    for member in (0, 2):
        merged = bnn.merge(member)
        assert not any(isinstance(module, Rank1Layer) for module in merged.modules())
        assert not any("rank1" in name for name, _ in merged.named_modules())
        # By name: a parametrized layer has a class of its own in each object.
        kinds = [[type(m).__name__ for m in network.modules()] for network in (merged, original)]
        assert kinds[0] == kinds[1]
        assert list(merged.state_dict()) == list(original.state_dict())
        args, kwargs = case.example()
        assert close(tensor(merged(*args, **kwargs)), before[member, 0], 5 * case.tolerance)
    assert torch.equal(predict(bnn, case), before), "merging leaves the Bayesian model alone"


def test_merge_keeps_training_flags_and_gradients() -> None:
    bnn = convert(BY_NAME["lstm"], members=3).train()
    bnn.model.head.weight.requires_grad_(False)
    merged = bnn.merge(-1)
    assert all(module.training for module in merged.modules())
    assert {n: p.requires_grad for n, p in merged.named_parameters()} == {
        n: n != "head.weight" for n, _ in merged.named_parameters()
    }


@pytest.mark.parametrize("member", [3, -4])
def test_merge_of_a_member_that_does_not_exist(member: int) -> None:
    with pytest.raises(BayesifyError, match=f"member {member} does not exist; there are 3"):
        mlp(members=3).merge(member)


def test_merging_tied_weights_unties_them() -> None:
    case = BY_NAME["gpt2"]
    bnn = convert(case, members=3).eval()
    embedding = bnn.model.transformer.wte.weight.detach().clone()
    merged = bnn.merge(1)
    assert torch.equal(merged.transformer.wte.weight, embedding)
    assert not torch.equal(merged.lm_head.weight, embedding)
    assert merged.config.tie_word_embeddings is False
    assert bnn.model.config.tie_word_embeddings is True


@pytest.mark.parametrize("name", ["T5", "MT5", "UMT5", "SwitchTransformers"])
@torch.no_grad()
def test_merged_heads_that_are_scaled_where_they_are_tied(name: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    small = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2, "num_experts": 2}
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    model = cls(getattr(transformers, f"{name}Config")(**small, tie_word_embeddings=True))
    bnn = bayesify(model, members=2, init_scale=0.3).eval()
    inputs = {"input_ids": torch.randint(3, 40, (3, 7)), "decoder_input_ids": torch.randint(3, 40, (3, 4))}
    merged = bnn.merge(1)
    expected = bnn.predict(**inputs).outputs[1, 0]
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)  # type: ignore[operator]
    again = cls.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


@every_case
@torch.no_grad()
def test_unload_gives_the_network_back(case: Case) -> None:
    model = case.model()
    args, kwargs = case.example()
    expected = tensor(model(*args, **kwargs))
    kinds, names = [type(m) for m in model.modules()], list(model.state_dict())
    bnn = bayesify(model, members=2, init_scale=0.3)
    assert not torch.equal(predict(bnn, case)[0, 0], expected)
    unloaded = bnn.unload()
    assert unloaded is model
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == names
    assert torch.equal(tensor(model(*args, **kwargs)), expected)
    with pytest.raises(BayesifyError, match="unloaded"):
        bnn.predict(*args, **kwargs)
    assert bayesify(model, members=2).report.converted, "and it converts anew"


# ------------------------------------------------------------------------------------------------ attributes and report


def test_other_attributes_are_the_networks() -> None:
    model = BY_NAME["bert"].model()
    bnn = bayesify(model, members=2)
    assert bnn.base_model_prefix == "bert"
    assert bnn.bert is model.bert
    assert bnn.config.members == 2
    with pytest.raises(AttributeError, match="no_such_thing"):
        bnn.no_such_thing  # noqa: B018


def test_optimizers_of_timm_leave_factors_and_what_the_network_names_undecayed() -> None:
    bnn = bayesify(timm.create_model("test_vit", num_classes=5, img_size=32), members=2, member_bias=True)
    names = {id(parameter): name for name, parameter in bnn.named_parameters()}
    for group in create_optimizer_v2(bnn, "adamw", lr=0.1, weight_decay=0.5).param_groups:
        found = {names[id(parameter)] for parameter in group["params"]}
        if group["weight_decay"]:
            assert found
            assert not any(".rank1." in name or "pos_embed" in name for name in found)
        else:
            assert "model.pos_embed" in found


def test_a_head_is_changed_before_the_conversion() -> None:
    bnn = bayesify(timm.create_model("test_resnet", num_classes=5), members=2)
    with pytest.raises(BayesifyError, match="call unload"):
        bnn.reset_classifier(3)
    assert bnn.model.num_classes == 5


@pytest.mark.parametrize("called", [False, True], ids=["at-once", "after-a-call"])
@pytest.mark.parametrize("how", ["reparameterized", "replaced"])
def test_layers_with_factors_that_others_take_out_are_an_error(called: bool, how: str) -> None:
    """They would be gone without a word: the network would be a plain one, and the KL that of nothing."""
    name = "test_resnet" if how == "replaced" else "mobileone_s0"
    bnn = bayesify(timm.create_model(name, num_classes=5), members=2).eval()
    x = torch.randn(4, 3, 32, 32)
    if called:
        bnn(x)
    if how == "replaced":
        bnn.model.fc = nn.Linear(bnn.model.num_features, 5)
    else:
        bnn = reparameterize_model(bnn)
    which = "fc" if how == "replaced" else "stem.* and [0-9]+ more"
    for training in (False, True):
        bnn.train(training)
        for call in (bnn, bnn.predict):
            with pytest.raises(BayesifyError, match=f"taken out of the network after the conversion: {which}"):
                call(x)


def test_layers_that_others_wrap_stay() -> None:
    bnn = bayesify(timm.create_model("test_resnet", num_classes=5), members=2, init_scale=0.3).eval()
    x = torch.randn(4, 3, 32, 32)
    expected = bnn(x)

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    bnn.model.layer3 = Wrapper(bnn.model.layer3)
    assert torch.equal(bnn(x), expected)
    bnn.unload()
    with pytest.raises(BayesifyError, match="unloaded"):
        bnn(x)


def test_a_batch_of_no_examples() -> None:
    bnn = bayesify(timm.create_model("test_resnet", num_classes=5), members=2).eval()
    x = torch.randn(3, 3, 32, 32)
    assert bnn.predict(x[:0]).outputs.shape == (2, 1, 0, 5)
    assert bnn(x[:0]).shape == (0, 5)
    assert bnn.predict(x, samples=2).outputs.shape == (2, 2, 3, 5)
    assert bnn.passes.strategies.of((x,), {}).workload is not None


def test_copying_does_not_fall_through_to_the_network() -> None:
    class Copies(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Any:
            twin = copy.copy(self)
            twin._modules = copy.deepcopy(self._modules, memo)
            return twin

    bnn = bayesify(Copies(nn.Linear(2, 2)), members=2)
    assert isinstance(copy.deepcopy(bnn), BayesianModel)


def test_resnet50_with_four_members_costs_1_63_percent() -> None:
    timm = pytest.importorskip("timm")
    report = inspect(timm.create_model("resnet50"), members=4, posterior="normal")
    assert report.parameters == 25_557_032
    assert report.parameter_overhead == 52_139 * 2 * 4 / 25_557_032
    assert "(1.63 %)" in str(report)
    assert len(report.converted) == 54
    assert sum(s + r for s, r in report.sizes.values()) == 52_139


@every_case
def test_report_counts_what_was_added(case: Case) -> None:
    model = case.model()
    before = sum(p.numel() for p in model.parameters())
    planned = inspect(model, members=3)
    bnn = bayesify(model, members=3)
    assert bnn.report.converted == planned.converted
    assert bnn.report.parameters == before
    assert sum(p.numel() for p in bnn.parameters()) - before == bnn.report.parameters_added
    assert {name for name, _, _ in bnn.factors()} == set(bnn.report.converted)
    text = str(bnn.report)
    assert all(name.rpartition(".")[2] in text for name in bnn.report.converted)


def test_report_names_ties() -> None:
    bnn = convert(BY_NAME["gpt2"], members=3)
    assert bnn.report.tied == {"lm_head": ["transformer.wte.weight"]}
    assert "transformer.wte.weight" in str(bnn.report)
    assert "embedding" in bnn.report.skipped["transformer.wte"]


# ------------------------------------------------------------------------------------------------ choosing layers


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.layer1 = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.layer10 = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer10(self.layer1[1](self.layer1[0](self.stem(x)))))


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), (), {"stem", "layer1.0", "layer1.1", "layer10", "head"}),
        (("layer1",), (), {"layer1.0", "layer1.1"}),
        (("layer1.1",), (), {"layer1.1"}),
        (("layer1*",), (), {"layer1.0", "layer1.1", "layer10"}),
        (("*.1", "head"), (), {"layer1.1", "head"}),
        ((), ("head", "layer1"), {"stem", "layer10"}),
        (("layer1",), ("layer1.0",), {"layer1.1"}),
        ("head", (), {"head"}),
    ],
    ids=["all", "prefix", "name", "glob", "two", "exclude", "both", "a-string"],
)
def test_include_and_exclude(include: Any, exclude: Any, expected: set[str]) -> None:
    bnn = bayesify(Nested(), members=2, include=include, exclude=exclude)
    assert set(bnn.report.converted) == expected
    rest = {"stem", "layer1.0", "layer1.1", "layer10", "head"} - expected
    assert set(bnn.report.skipped) == rest
    for name in rest:
        assert "include" in bnn.report.skipped[name] or "excluded by" in bnn.report.skipped[name]
    assert {name for name, m in bnn.model.named_modules() if isinstance(m, Rank1Layer)} == expected


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_pattern_without_a_match_names_its_neighbors(option: str) -> None:
    with pytest.raises(ConversionError, match=r"'haed' matches no layer\. Nearest names: head"):
        bayesify(Nested(), members=2, **{option: ("haed",)})


def test_everything_excluded_is_an_error() -> None:
    with pytest.raises(ConversionError, match="found no layer to convert"):
        bayesify(Nested(), members=2, exclude=("*",))


def test_converted_model_is_refused() -> None:
    bnn = mlp()
    for model in (bnn, bnn.model, nn.Sequential(bnn.model)):
        with pytest.raises(ConversionError, match="already Bayesian"):
            bayesify(model)


def test_config_and_keywords_do_not_mix() -> None:
    with pytest.raises(ConfigError, match="not both"):
        bayesify(Nested(), Rank1Config(), members=2)
    with pytest.raises(ConfigError, match="memebers"):
        bayesify(Nested(), memebers=2)


def test_own_layer_is_registered_with_a_decorator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))

    class Diagonal(nn.Module):
        """y = w ∘ x: a linear map with a diagonal matrix."""

        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(size))
            self.bias = None

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    model = nn.Sequential(nn.Linear(3, 3), Diagonal(3))
    assert set(inspect(model, members=2).converted) == {"0"}

    @rank1(Diagonal)
    class Rank1Diagonal(Rank1Layer, Diagonal):
        @classmethod
        def sizes(cls, layer: Diagonal) -> dict[str, tuple[int, int]]:
            return {"weight": (layer.weight.numel(), layer.weight.numel())}

    diagonal = model[1].weight.detach()
    dense, bias = model[0].weight.detach(), model[0].bias.detach()
    bnn = bayesify(model, members=2, init_scale=0.3)
    assert bnn.report.converted == {"0": "Linear", "1": "Diagonal"}
    locs = {(name, side): factor.loc for name, side, factor in bnn.factors()}
    x = torch.randn(4, 3)
    for k, found in enumerate(bnn.predict(x).outputs[:, 0]):
        hidden = x @ (dense * torch.outer(locs["0", "r"][k], locs["0", "s"][k])).T + bias
        torch.testing.assert_close(found, hidden * diagonal * locs["1", "r"][k] * locs["1", "s"][k])
    registry.rank1_class.cache_clear()


# ------------------------------------------------------------------------------------------------ bare layers


def test_bare_linear_layer() -> None:
    model = nn.Linear(4, 3)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    bnn = bayesify(model, members=2, init_scale=0.3)
    assert list(bnn.report.converted) == [""]
    assert isinstance(bnn.model, nn.Linear)
    x = torch.randn(5, 4)
    (s, r) = (factor.loc for _, _, factor in bnn.factors())
    for k, found in enumerate(bnn.predict(x).outputs[:, 0]):
        torch.testing.assert_close(found, x @ (weight * torch.outer(r[k], s[k])).T + bias)
    assert "(the model)" in str(bnn.report)
    assert type(bnn.unload()) is nn.Linear


def lstm_reference(base: nn.LSTM, bnn: BayesianModel, member: int) -> nn.LSTM:
    reference = copy.deepcopy(base)
    locs = {(name, side): factor.loc[member].detach() for name, side, factor in bnn.factors()}
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.startswith("weight"):
                parameter.mul_(torch.outer(locs[name, "r"], locs[name, "s"]))
    return reference


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "time-first"])
@torch.no_grad()
def test_bare_lstm_with_an_initial_state(batch_first: bool) -> None:
    # As many layers as rows, so that confusing the two dimensions would not even fail.
    base = nn.LSTM(4, 5, num_layers=6, batch_first=batch_first).eval()
    bnn = bayesify(copy.deepcopy(base), members=2, posterior="deterministic", init_scale=0.3).eval()
    x = torch.randn(3, 7, 4) if batch_first else torch.randn(7, 3, 4)
    state = (torch.randn(6, 3, 5), torch.randn(6, 3, 5))
    references = [lstm_reference(base, bnn, k)(x, state) for k in range(2)]
    for k, found in enumerate(bnn.predict(x, state).outputs[:, 0]):
        expected = references[k][0] if batch_first else references[k][0].transpose(0, 1)
        torch.testing.assert_close(found, expected)
    output, (h, c) = bnn(x, state)
    torch.testing.assert_close(output, (references[0][0] + references[1][0]) / 2)
    for found, index in ((h, 0), (c, 1)):
        torch.testing.assert_close(found, (references[0][1][index] + references[1][1][index]) / 2)
    named, _ = bnn(x, hx=state)
    torch.testing.assert_close(named, output)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "time-first"])
@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
@torch.no_grad()
def test_packed_sequence_as_input(batch_first: bool, enforce_sorted: bool) -> None:
    base = nn.LSTM(4, 5, num_layers=2, batch_first=batch_first).eval()
    bnn = bayesify(copy.deepcopy(base), members=2, posterior="deterministic", init_scale=0.3).eval()
    lengths = torch.tensor([6, 4, 1]) if enforce_sorted else torch.tensor([4, 6, 1])
    packed = pack_padded_sequence(torch.randn(3, 6, 4), lengths, batch_first=True, enforce_sorted=enforce_sorted)
    references = [lstm_reference(base, bnn, k)(packed) for k in range(2)]
    padded = [pad_packed_sequence(output, batch_first=True)[0] for output, _ in references]
    for k, found in enumerate(bnn.predict(packed).outputs[:, 0]):
        torch.testing.assert_close(found, padded[k])
    output, (h, _) = bnn(packed)
    assert isinstance(output, PackedSequence)
    found, found_lengths = pad_packed_sequence(output, batch_first=True)
    assert torch.equal(found_lengths, lengths)
    torch.testing.assert_close(found, (padded[0] + padded[1]) / 2)
    torch.testing.assert_close(h, (references[0][1][0] + references[1][1][0]) / 2)
    rows, (states, _) = bnn.train()(packed)
    found, found_lengths = pad_packed_sequence(rows, batch_first=True)
    assert torch.equal(found_lengths, lengths.repeat(2))
    torch.testing.assert_close(found, torch.cat(padded))
    torch.testing.assert_close(states, torch.cat([state[0] for _, state in references], 1))


# ------------------------------------------------------------------------------------------------ import


def test_import_loads_no_heavy_library() -> None:
    code = (
        "import sys, bayesify; "
        "print(sorted({'timm', 'transformers', 'datasets', 'matplotlib', 'accelerate'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
