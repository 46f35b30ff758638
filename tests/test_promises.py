"""The six promises of the library, each over the model table."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Case, convert, every_case, some_cases, tensor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bayesify import BayesianModel, BayesifyError, ConversionError, Rank1Layer, bayesify, rank1
from bayesify.layers import registry


def call(model: nn.Module, case: Case) -> Tensor:
    args, kwargs = case.example()
    return tensor(model(*args, **kwargs))


def example_in(case: Case, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The case's example with its real numbers in another precision."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = case.example()
    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def outputs(bnn: BayesianModel, case: Case, **options: Any) -> Tensor:
    """[K, S, B, ...] of predict."""
    args, kwargs = case.example()
    return bnn.predict(*args, **kwargs, **options).outputs


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# ------------------------------------------------------------------------------------------------ 1 identity


@every_case
@pytest.mark.parametrize("posterior", ["deterministic", "normal"])
@torch.no_grad()
def test_members_at_one_reproduce_the_network(case: Case, posterior: Any) -> None:
    model = case.model()
    expected = call(model, case)
    bnn = bayesify(model, members=3, init="ones", posterior=posterior, posterior_scale=0.0)
    for samples in (None, 2):  # at the posterior mean, and drawn with no spread
        found = outputs(bnn, case, samples=samples, seed=0)
        assert found.shape[:2] == (3, samples or 1)
        for member in found.flatten(0, 1):
            assert relative_error(member, expected) <= case.tolerance


@every_case
@pytest.mark.parametrize("posterior", ["deterministic", "normal"])
def test_one_member_at_one_trains_like_the_network(case: Case, posterior: Any) -> None:
    base = case.model().train()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    bnn = bayesify(copy.deepcopy(base), members=1, init="ones", posterior=posterior, posterior_scale=0.0)
    args, kwargs = case.example()
    torch.manual_seed(3)
    expected = tensor(base(*args, **kwargs))
    torch.manual_seed(3)
    found = tensor(bnn(*args, **kwargs))
    assert relative_error(found.detach(), expected.detach()) <= case.tolerance
    statistics = dict(bnn.model.named_buffers())
    for name, buffer in base.named_buffers():
        torch.testing.assert_close(statistics[name], buffer, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ 2 exact members


def reference_member(original: nn.Module, bnn: BayesianModel, member: int) -> nn.Module:
    """The original network with every W replaced by W ∘ (r sᵀ), written out entry by entry."""
    locs = {(name, side): factor.loc[member].detach().clone() for name, side, factor in bnn.factors()}
    reference = copy.deepcopy(original)
    modules = dict(reference.named_modules())
    written = set()
    for site in {name for name, _ in locs}:
        s, r = locs[site, "s"], locs[site, "r"]
        if site in modules:
            write_layer(modules[site], s, r)
        else:  # one kernel of a recurrent layer
            owner, _, weight = site.rpartition(".")
            write(modules[owner], weight, getattr(modules[owner], weight) * torch.outer(r, s))
        written.add(site)
    assert written == set(bnn.report.converted)
    return reference


def write_layer(layer: nn.Module, s: Tensor, r: Tensor) -> None:
    weight = layer.weight.detach().clone()
    if type(layer).__name__ in ("ScaledStdConv2d", "ParametrizedConv1d"):
        # Its code makes W from its parameters, so the factors go around the operator: y = r ∘ L(s ∘ x) + (1 − r) ∘ b.
        column = (1, -1, *[1] * (weight.dim() - 2))
        bias = torch.zeros_like(r) if layer.bias is None else layer.bias
        layer.register_forward_pre_hook(lambda _, args: (args[0] * s.view(column),))
        layer.register_forward_hook(lambda _, args, y: r.view(column) * y + ((1 - r) * bias).view(column))
        return
    if isinstance(layer, nn.Linear):
        weight *= torch.outer(r, s)
    elif type(layer).__name__ == "Conv1D":
        weight *= torch.outer(s, r)
    elif isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        for i in range(layer.in_channels):
            for o in range(outputs):
                weight[i, o] *= s[i] * r[(i // inputs) * outputs + o]
    else:
        inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        for o in range(layer.out_channels):
            first = (o // outputs) * inputs
            weight[o] *= r[o] * s[first : first + inputs].view(-1, *[1] * (weight.dim() - 2))
    write(layer, "weight", weight)


def write(layer: nn.Module, name: str, value: Tensor) -> None:
    # A new parameter, so that whatever was tied to the old one keeps it.
    setattr(layer, name, nn.Parameter(value.detach()))


@every_case
@torch.no_grad()
def test_member_equals_network_with_scaled_weights(case: Case) -> None:
    bnn = convert(case, members=3)
    found = outputs(bnn, case)[:, 0]
    base = call(case.model(), case)
    for k in range(3):
        expected = call(reference_member(case.model(), bnn, k), case)
        assert relative_error(expected, base) > 1e-2
        assert relative_error(found[k], expected) <= 5 * case.tolerance


# ------------------------------------------------------------------------------------------------ 3 nothing silent


class LinearOperands(TorchDispatchMode):
    """Notes the storage of everything that enters a matrix product or a convolution."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "mkldnn_rnn_layer", "linear")

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.strip("_") in self.NAMES:
            self.storages |= {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        return func(*args, **(kwargs or {}))


ADDED = ("pos_embed", "cls_token", "position_embeddings", "relative_position_bias_table")
"""Parameters with two or more dimensions that are added to activations."""


@every_case
@torch.no_grad()
def test_every_matrix_is_converted_or_listed(case: Case) -> None:
    model = case.model()
    with LinearOperands() as seen:
        call(model, case)
    multiplied = {n for n, p in model.named_parameters() if p.untyped_storage().data_ptr() in seen.storages}
    assert multiplied, "the probe saw the products"
    ties = tied_groups(model)
    bnn = bayesify(model, members=2)
    layers = {name for name, _ in bnn.layers()}

    def accounted(name: str) -> bool:
        names = ties.get(name, {name})
        return any(n.startswith(f"{layer}.") for n in names for layer in layers) or any(
            n == skipped or n.startswith(f"{skipped}.") for n in names for skipped in bnn.report.skipped
        )

    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and name.rpartition(".")[2] not in ADDED and ".rank1." not in name:
            assert accounted(name), name
    for name in multiplied:
        assert accounted(name), name


def tied_groups(model: nn.Module) -> dict[str, set[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {name: group for group in groups.values() for name in group}


@every_case
@torch.no_grad()
def test_factors_move_their_member_and_no_other(case: Case) -> None:
    # In float64, because the attention of a fresh network is so flat that its queries hardly matter.
    bnn = convert(case, members=2).double()
    args, kwargs = example_in(case, torch.float64)
    before = bnn.predict(*args, **kwargs).outputs
    factors = list(bnn.factors())
    # The next test covers every site by its gradient; here about ten of them really move.
    for name, side, factor in factors[:: max(1, len(factors) // 20 * 2 + 1)]:
        kept = factor.loc.clone()
        factor.loc[1] += 0.3 * torch.randn(factor.size)
        after = bnn.predict(*args, **kwargs).outputs
        assert torch.equal(after[0], before[0]), f"{side} of {name} leaks into another member"
        assert relative_error(after[1], before[1]) > 1e-11, f"{side} of {name} does nothing"
        factor.loc.copy_(kept)


@every_case
def test_every_factor_has_a_gradient_from_its_member_and_no_other(case: Case) -> None:
    bnn = convert(case, members=2).double().eval()
    bnn.training = True  # rows of training, without batch statistics
    args, kwargs = example_in(case, torch.float64)
    found = tensor(bnn(*args, **kwargs)).unflatten(0, (2, -1))
    for member in range(2):
        bnn.zero_grad()
        (found[member] * torch.randn(found[member].shape)).sum().backward(retain_graph=True)
        for name, side, factor in bnn.factors():
            for part, parameter in factor.named_parameters():
                assert parameter.grad is not None, f"{side} of {name} ({part})"
                assert bool(parameter.grad[member].abs().max() > 0), f"{side} of {name} ({part})"
                assert bool((parameter.grad[1 - member] == 0).all()), f"{side} of {name} ({part})"


# ------------------------------------------------------------------------------------------------ 4 one copy


@every_case
def test_slow_weights_stay_where_and_what_they_are(case: Case) -> None:
    model = case.model()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    facts = {n: (p.data_ptr(), p.dtype, p.device, p.requires_grad) for n, p in parameters.items()}
    names = list(model.state_dict())
    bnn = bayesify(model, members=2)
    after = dict(bnn.model.named_parameters(remove_duplicate=False))
    assert {n: (p.data_ptr(), p.dtype, p.device, p.requires_grad) for n, p in after.items() if n in facts} == facts
    assert all(after[name] is parameter for name, parameter in parameters.items()), "tied weights stay tied"
    assert [name for name in bnn.model.state_dict() if ".rank1." not in name] == names
    assert all(p.requires_grad for n, p in after.items() if n not in facts)


@every_case
@torch.no_grad()
def test_original_checkpoint_loads(case: Case) -> None:
    other = case.model(seed=5)
    expected = call(other, case)
    bnn = bayesify(case.model(), members=2, init="ones")
    assert relative_error(outputs(bnn, case)[0, 0], expected) > 1e-2
    bnn.model.load_state_dict(other.state_dict(), strict=True)
    assert relative_error(outputs(bnn, case)[0, 0], expected) <= case.tolerance


@some_cases("cnn", "resnet18", "bert")
def test_modules_keep_their_training_flags(case: Case) -> None:
    model = case.model().train()
    frozen = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))]
    for module in frozen:
        module.eval()
    flags = {name: m.training for name, m in model.named_modules()}
    bnn = bayesify(model, members=2)
    assert bnn.training
    assert {name: m.training for name, m in bnn.model.named_modules() if name in flags} == flags


# ------------------------------------------------------------------------------------------------ 5 same object


@every_case
@torch.no_grad()
def test_deepcopy_is_equal_and_independent(case: Case) -> None:
    bnn = convert(case, members=2)
    bnn.train()
    call(bnn, case)  # the draws of a training step must not stand in the way of a copy
    bnn.eval()
    twin = copy.deepcopy(bnn)
    assert isinstance(twin.model, type(case.model()))
    before = outputs(bnn, case)
    assert torch.equal(outputs(twin, case), before)
    for _, _, factor in twin.factors():
        factor.loc += 0.2 * torch.randn(factor.loc.shape)
    assert relative_error(outputs(twin, case), before) > 1e-3
    assert torch.equal(outputs(bnn, case), before)


@every_case
@torch.no_grad()
def test_state_dict_round_trip(case: Case) -> None:
    bnn = convert(case, members=2)
    fresh = bayesify(case.model(seed=5), members=2, init="normal", init_scale=0.3)
    expected = outputs(bnn, case, samples=2, seed=4)
    assert relative_error(outputs(fresh, case, samples=2, seed=4), expected) > 1e-3
    file = io.BytesIO()
    torch.save(bnn.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(outputs(fresh, case, samples=2, seed=4), expected)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
@torch.no_grad()
def test_low_precision_is_close(case: Case, dtype: torch.dtype) -> None:
    bnn = convert(case, members=2, init_scale=0.1)
    expected = outputs(bnn, case, samples=1, seed=0)
    bnn.to(dtype)
    args, kwargs = example_in(case, dtype)
    found = bnn.predict(*args, **kwargs, samples=1, seed=0).outputs
    assert found.dtype == dtype
    assert relative_error(found.float(), expected) < (0.02 if dtype == torch.float16 else 0.15)


@every_case
def test_autocast_trains(case: Case) -> None:
    bnn = convert(case, members=2, init_scale=0.1).train()
    for module in bnn.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # statistics of two examples magnify rounding
    torch.manual_seed(2)
    args, kwargs = case.example()
    torch.manual_seed(2)
    expected = tensor(bnn(*args, **kwargs)).detach()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = tensor(bnn(*args, **kwargs))
    assert relative_error(found.detach().float(), expected) < 0.15
    found.float().square().sum().backward()
    for name, side, factor in bnn.factors():
        assert torch.isfinite(factor.loc.grad).all(), f"{side} of {name}"


CHECKPOINTING = [
    "resnet18", "convnext_atto", "test_efficientnet", "vit_tiny", "swin_tiny", "mixer",
    "bert", "distilbert", "gpt2", "llama", "t5", "vit_hf", "wav2vec2",
]  # fmt: skip


@some_cases(*CHECKPOINTING)
@pytest.mark.parametrize("noise", ["example", "member"])
def test_gradient_checkpointing_changes_nothing(case: Case, noise: Any) -> None:
    plain = convert(case, members=3, noise=noise, posterior_scale=0.1)
    checkpointed = copy.deepcopy(plain)
    if hasattr(checkpointed.model, "set_grad_checkpointing"):
        checkpointed.set_grad_checkpointing(True)
    else:
        # Renamed in transformers 5.
        enable = getattr(checkpointed.model, "activation_checkpointing_enable", None)
        (enable or checkpointed.model.gradient_checkpointing_enable)()
    found = [loss_and_gradients(bnn.train(), case) for bnn in (plain, checkpointed)]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    # Where it is kept, r's gradient is had from the output, and else from the product: not with the same rounding.
    rounding = 1e-6 * max(float(gradient.abs().max()) for gradient in found[0][1].values())
    for name, gradient in found[0][1].items():
        atol = 1e-4 * float(gradient.abs().max()) + rounding
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-3, atol=atol)


def loss_and_gradients(model: nn.Module, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    args, kwargs = case.example()
    kwargs = {**kwargs, "use_cache": False} if case.name in ("gpt2", "llama", "t5") else kwargs
    torch.manual_seed(11)
    found = tensor(model(*args, **kwargs))
    loss = found.float().square().mean()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@some_cases("mlp", "resnet18", "bert")
@torch.no_grad()
def test_compiled_model_predicts_the_same(case: Case) -> None:
    bnn = convert(case, members=2).eval()
    expected = call(bnn, case)
    torch.compiler.reset()
    assert relative_error(call(torch.compile(bnn, backend="eager"), case), expected) <= case.tolerance
    torch.compiler.reset()
    inner = copy.deepcopy(bnn)
    inner.model.compile(backend="eager")
    assert relative_error(call(inner, case), expected) <= case.tolerance


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@some_cases("mlp", "cnn")
def test_compiled_model_trains_the_same(case: Case) -> None:
    bnn = convert(case, members=2, posterior_scale=0.1).train()
    loss, gradients = loss_and_gradients(bnn, case)
    torch.compiler.reset()
    twin = copy.deepcopy(bnn)
    twin.model.compile(backend="aot_eager")
    found, found_gradients = loss_and_gradients(twin, case)
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-6)
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found_gradients[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-8
        )


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@some_cases("cnn", "vit_tiny")
def test_distributed_data_parallel_changes_nothing(case: Case, process_group: None) -> None:
    plain = convert(case, members=2, posterior_scale=0.1).train()
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    loss, gradients = loss_and_gradients(plain, case)
    found, found_gradients = loss_and_gradients(wrapped, case)
    torch.testing.assert_close(found, loss)
    assert {name.removeprefix("module.") for name in found_gradients} == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[f"module.{name}"], gradient)


@some_cases("resnet18", "convnext_atto", "test_efficientnet", "vit_tiny", "swin_tiny", "mixer", "test_nfnet")
@torch.no_grad()
def test_timm_methods_still_work(case: Case) -> None:
    model = case.model()
    (images,), _ = case.example()
    expected = model.forward_features(images)
    head = model.get_classifier()
    bnn = bayesify(model, members=2, init="ones").eval()
    assert relative_error(bnn.forward_features(images), expected) <= case.tolerance
    assert bnn.get_classifier() is head
    assert isinstance(head, Rank1Layer)
    assert bnn.num_classes == 7


@some_cases("gpt2", "llama")
@torch.no_grad()
def test_generate_still_works(case: Case) -> None:
    model = case.model()
    prompt = torch.randint(3, 50, (2, 4))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **options)
    bnn = bayesify(model, members=2, init="ones").eval()
    assert torch.equal(bnn.model.generate(prompt, **options), expected)
    assert bnn.model.config.vocab_size == 50


# ------------------------------------------------------------------------------------------------ 6 all or nothing


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "training": [module.training for module in model.modules()],
        "gradients": [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()],
        "names": list(model.state_dict()),
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def fails_and_leaves_alone(model: nn.Module, **options: Any) -> str:
    """Convert, expect the error, compare everything with how it was, and return the message."""
    before, values = snapshot(model), {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ConversionError) as caught:
        bayesify(model, **options)
    assert isinstance(caught.value, ValueError)
    assert snapshot(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    return str(caught.value)


def mixed_modes(model: nn.Module) -> nn.Module:
    """Training flags that differ, so that setting them all alike is noticed."""
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    return model


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Classes registered by the test are forgotten after it."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    yield
    registry.rank1_class.cache_clear()


@every_case
def test_pattern_without_a_match_changes_nothing(case: Case) -> None:
    message = fails_and_leaves_alone(mixed_modes(case.model()), include=("no.such.layer",))
    assert "'no.such.layer' matches no layer" in message
    assert "Nearest names: " in message
    assert "globs" in message


@every_case
def test_failure_half_way_changes_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from bayesify.graph import rewrite

    real, calls = rewrite.attach, []

    def attach(layer: nn.Module, sites: Any) -> None:
        calls.append(layer)
        real(layer, sites)
        if len(calls) == 2:
            raise RuntimeError("out of luck")

    monkeypatch.setattr(rewrite, "attach", attach)
    message = fails_and_leaves_alone(mixed_modes(case.model()))
    assert len(calls) == 2
    assert "out of luck" in message
    assert "exclude=" in message


def test_layer_that_cannot_change_its_class_changes_nothing(own_registry: None) -> None:
    class Plain(nn.Linear):
        pass

    @rank1(Plain)
    class Rank1Slotted(Rank1Layer, Plain):
        __slots__ = ("extra",)  # another layout in memory, to which Python refuses to change an object

        @classmethod
        def sizes(cls, layer: Any) -> dict[str, tuple[int, int]]:
            return {"weight": (layer.in_features, layer.out_features)}

    message = fails_and_leaves_alone(nn.Sequential(nn.Linear(4, 3), Plain(3, 2)))
    assert "layer '1' (Plain)" in message
    assert "exclude='1'" in message


def test_layer_with_a_child_of_the_same_name_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].rank1 = nn.Identity()
    assert "rank1" in fails_and_leaves_alone(model)


def test_audit_finds_wrong_arithmetic_and_changes_nothing(own_registry: None) -> None:
    class Halving(nn.Linear):
        pass

    @rank1(Halving)
    class Rank1Halving(Rank1Layer, Halving):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight / 2, self.bias)

        @classmethod
        def sizes(cls, layer: Any) -> dict[str, tuple[int, int]]:
            return {"weight": (layer.in_features, layer.out_features)}

    model = mixed_modes(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), Halving(3, 2)))
    message = fails_and_leaves_alone(model, example_inputs=torch.randn(3, 4))
    assert "with every factor at 1" in message
    assert "expected at most 1e-04" in message
    assert "exclude=" in message


@some_cases("cnn", "bert", "packed_gru")
def test_example_inputs_that_do_not_fit_change_nothing(case: Case) -> None:
    message = fails_and_leaves_alone(mixed_modes(case.model()), example_inputs=torch.randn(2, 1))
    assert "example_inputs" in message


@every_case
def test_audit_passes_and_leaves_no_trace(case: Case) -> None:
    model = mixed_modes(case.model())
    flags = {name: m.training for name, m in model.named_modules()}
    values = {n: v.clone() for n, v in model.state_dict().items()}
    args, kwargs = case.example()
    bnn = bayesify(model, members=2, example_inputs=kwargs or args)
    assert bnn.report.converted
    assert {n: m.training for n, m in model.named_modules() if n in flags} == flags
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert all(p.grad is None for p in model.parameters())


def test_model_without_linear_maps_is_refused() -> None:
    message = fails_and_leaves_alone(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()))
    assert "found no layer to convert" in message
    assert "BatchNorm1d" in message
    assert "@rank1" in message


def test_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module"):
        bayesify("resnet18")  # type: ignore[arg-type]
    assert issubclass(ConversionError, BayesifyError)
