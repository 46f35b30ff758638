"""What members have of their own: biases, batch norms; and the variant in which factors are added."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES, Case, tensor
from torch import Tensor, nn

from bayesify import (
    BayesianModel,
    BayesifyError,
    ConfigError,
    ConversionError,
    FineTuneConfig,
    FineTuner,
    Rank1Config,
    bayesify,
    from_pretrained,
    inspect,
)
from bayesify.added import Added
from bayesify.finetune.groups import select_trained
from bayesify.layers import MemberBatchNorm, MemberNorm, MemberVector

every_size = pytest.mark.parametrize("members", [1, 3], ids=["K1", "K3"])
NEUTRAL = {"init": "ones", "posterior": "deterministic"}
"""Members that differ in nothing but what else they have of their own."""


def _timm(name: str, size: int) -> Case:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=5)

    return Case(name, build, lambda: (torch.randn(2, 3, size, size),))


BY_NAME = {case.name: case for case in [*CASES, _timm("test_resnet", 32)]}


def some_cases(*names: str) -> Any:
    return pytest.mark.parametrize("case", [BY_NAME[name] for name in names], ids=lambda case: case.name)


def convert(model: nn.Module, members: int, **options: Any) -> BayesianModel:
    torch.manual_seed(7)
    return bayesify(model, members=members, **{"init_scale": 0.3, **options})


@torch.no_grad()
def disturb(bnn: BayesianModel, scale: float = 0.5) -> BayesianModel:
    """Members that differ in everything they have of their own, as after training."""
    torch.manual_seed(9)
    for module in bnn.modules():
        if isinstance(module, MemberVector):
            module.offset.normal_(0, scale)
        elif isinstance(module, MemberNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.copy_(torch.arange(bnn.members))
    return bnn


def outputs(bnn: BayesianModel, case: Case, **options: Any) -> Tensor:
    """[K, S, B, ...] of predict."""
    args, kwargs = case.example()
    return bnn.predict(*args, **kwargs, **options).outputs


def call(model: nn.Module, case: Case) -> Tensor:
    args, kwargs = case.example()
    return tensor(model(*args, **kwargs))


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    """The same names, values and classes, bit for bit."""
    a, b = found.state_dict(), expected.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert [(n, type(m)) for n, m in found.named_modules()] == [(n, type(m)) for n, m in expected.named_modules()]


# ------------------------------------------------------------------------------------------------ both kinds

OWN = {"member_bias": True, "member_batch_norm": True}
with_own = some_cases("mlp", "cnn", "lstm", "packed_gru", "gpt2", "test_efficientnet")


@every_size
@with_own
@torch.no_grad()
def test_own_parts_start_as_the_shared_ones(case: Case, members: int) -> None:
    shared = outputs(convert(case.model(), members), case, samples=2, seed=0)
    own = outputs(convert(case.model(), members, **OWN), case, samples=2, seed=0)
    torch.testing.assert_close(own, shared, rtol=1e-5, atol=1e-6 * float(shared.abs().max()))


@every_size
@pytest.mark.parametrize(
    ("name", "factors"),
    [("mlp", "both"), ("cnn", "inputs"), ("cnn", "outputs"), ("lstm", "both"), ("lstm", "outputs"), ("gpt2", "inputs"),
     ("test_efficientnet", "both")],
)  # fmt: skip
def test_parameters_added_are_counted_exactly(name: str, members: int, factors: Any) -> None:
    case = BY_NAME[name]
    model = case.model()
    before = sum(p.numel() for p in model.parameters())
    without = inspect(model, members=members, factors=factors).parameters_added
    planned = inspect(model, members=members, factors=factors, **OWN).parameters_added
    bnn = convert(model, members, factors=factors, **OWN)
    after = sum(p.numel() for p in bnn.parameters())
    assert planned == bnn.report.parameters_added == after - before
    own = sum(m.offset.numel() for m in bnn.modules() if isinstance(m, MemberVector))
    assert own == planned - without > 0


@every_size
@with_own
def test_every_parameter_gets_a_gradient(case: Case, members: int) -> None:
    """As distributed training needs; and each member's offsets get one of their own."""
    bnn = disturb(convert(case.model(), members, **OWN), 0.1).train()
    output = call(bnn, case)
    torch.manual_seed(1)
    (output * torch.randn_like(output)).sum().backward()
    for name, parameter in bnn.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("offset"):
            assert (parameter.grad.abs().amax(1) > 0).all(), name


@every_size
@with_own
@torch.no_grad()
def test_merge_gives_the_member(case: Case, members: int) -> None:
    bnn = disturb(convert(case.model(), members, **OWN)).eval()
    expected = outputs(bnn, case)[:, 0]
    for member in range(members):
        merged = bnn.merge(member)
        assert not any(isinstance(module, Added) for module in merged.modules())
        assert merged.state_dict().keys() == case.model().state_dict().keys()
        found = call(merged, case)
        torch.testing.assert_close(found, expected[member], rtol=1e-3, atol=1e-4 * float(found.abs().max()))


@every_size
@with_own
@torch.no_grad()
def test_unload_restores_every_bit(case: Case, members: int) -> None:
    original = case.model()
    bnn = disturb(convert(copy.deepcopy(original), members, **OWN)).train()
    call(bnn, case)
    norms = {name: layer for name, layer in bnn.model.named_modules() if isinstance(layer, MemberBatchNorm)}
    averages = {f"{name}.{key}": v for name, layer in norms.items() for key, v in layer.state_of(None)[1].items()}
    found = bnn.unload().eval()
    # Statistics that training has moved stay, as they do where members share them.
    state = found.state_dict()
    for name, value in averages.items():
        assert torch.equal(state[name], value), name
    found.load_state_dict({name: original.state_dict()[name] for name in averages}, strict=False)
    assert_same_state(found, original)
    assert torch.equal(call(found, case), call(original, case))


@torch.no_grad()
def test_unload_without_training_leaves_statistics_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    model[1].running_mean.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bnn = bayesify(model, members=3, member_batch_norm=True).eval()
    bnn(torch.randn(5, 4))
    bnn.unload()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@every_size
@some_cases("mlp", "cnn", "lstm", "test_efficientnet")
@torch.no_grad()
def test_saved_and_loaded(case: Case, members: int, tmp_path: Path) -> None:
    bnn = disturb(convert(case.model(), members, **OWN)).eval()
    bnn.save_pretrained(tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved", base_model=case.model(seed=3))
    assert loaded.config == bnn.config
    assert_same_state(loaded, bnn)
    assert torch.equal(outputs(loaded, case, samples=2, seed=4), outputs(bnn, case, samples=2, seed=4))


@torch.no_grad()
def test_only_changed_weights_are_saved_beside_own_parts(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from bayesify.hub import load_base, origin_of, save_timm_folder

    save_timm_folder(BY_NAME["test_efficientnet"].model(), tmp_path / "base")
    base = load_base(tmp_path / "base")
    bnn = bayesify(base.model, members=2, **OWN)
    bnn.origin = origin_of(bnn.model, base)
    disturb(bnn).eval()
    bnn.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "bayesify.safetensors")
    assert all(".rank1." in name for name in stored)
    statistics = [name for name in stored if name.endswith("rank1.running_mean")]
    assert len(statistics) == len(batch_norms(bnn.model)) > 0
    assert_same_state(from_pretrained(tmp_path / "saved"), bnn)


@every_size
@with_own
@torch.no_grad()
def test_members_in_chunks(case: Case, members: int) -> None:
    bnn = disturb(convert(case.model(), members, **OWN)).eval()
    whole = outputs(bnn, case, samples=2, seed=2)
    for chunk in range(1, members):
        found = outputs(bnn, case, samples=2, seed=2, member_chunk=chunk)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


@every_size
@with_own
def test_copies_are_equal_and_independent(case: Case, members: int) -> None:
    bnn = disturb(convert(case.model(), members, **OWN))
    twin = copy.deepcopy(bnn)
    assert_same_state(twin, bnn)
    before = outputs(bnn, case)
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, MemberVector):
                module.offset.add_(1)
            elif isinstance(module, MemberNorm):
                module.running_mean.add_(1)
    assert torch.equal(outputs(bnn, case), before)
    assert not torch.allclose(outputs(twin, case), before, atol=1e-3)


@every_size
@some_cases("mlp", "cnn", "lstm", "test_efficientnet")
@torch.no_grad()
def test_bare_network_computes_with_the_average(case: Case, members: int) -> None:
    """In eval mode, and as a copy made after a training step, when draws and members are in force."""
    bnn = disturb(convert(case.model(), members, **OWN)).eval()
    expected = copy.deepcopy(bnn)
    for module in expected.modules():
        for name in ("loc", "offset", "running_mean", "running_var"):
            own = getattr(module, name, None)
            if isinstance(module, Added) and isinstance(own, Tensor):
                own.copy_(own.mean(0, keepdim=True).expand_as(own))
    average = outputs(expected, case)[0, 0]
    torch.testing.assert_close(call(bnn.model, case), average, rtol=1e-4, atol=1e-5 * float(average.abs().max()))
    call(bnn.train(), case)
    stepped, frozen = copy.deepcopy(bnn).model, copy.deepcopy(bnn).model.eval()
    for module in stepped.modules():
        module.training = False  # unlike eval(), leaves in force whatever is
    assert torch.equal(call(stepped, case), call(frozen, case))


@pytest.mark.parametrize("how", ["pickle", "state dict"])
@torch.no_grad()
def test_torch_save(how: str) -> None:
    case = BY_NAME["test_efficientnet"]
    bnn = disturb(convert(case.model(), 2, **OWN)).eval()
    file = io.BytesIO()
    torch.save(bnn if how == "pickle" else bnn.state_dict(), file)
    file.seek(0)
    if how == "pickle":
        loaded = torch.load(file, weights_only=False)
    else:
        loaded = convert(case.model(seed=4), 2, **OWN).eval()
        loaded.load_state_dict(torch.load(file), strict=True)
    assert_same_state(loaded, bnn)
    assert torch.equal(outputs(loaded, case), outputs(bnn, case))


@torch.no_grad()
def test_sixteen_bits() -> None:
    """A network that is bfloat16 throughout stays so, close to the one in float32."""
    case = BY_NAME["cnn"]
    full = disturb(convert(case.model(), 3, **OWN), 0.2).train()
    low = bayesify(case.model().bfloat16(), full.config).train()
    low.load_state_dict(full.state_dict())
    low.model.bfloat16()
    for network, dtype in ((full, torch.float32), (low, torch.bfloat16)):
        for module in network.modules():
            if isinstance(module, MemberVector):
                module.float()  # as a conversion makes them
        assert call_as(network, case, dtype).dtype == dtype
    a, b = (outputs_as(n.eval(), case, d) for n, d in ((full, torch.float32), (low, torch.bfloat16)))
    assert float((a - b).abs().max() / a.abs().max()) < 0.05
    merged = low.merge(1)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def call_as(model: nn.Module, case: Case, dtype: torch.dtype) -> Tensor:
    (x,), _ = case.example()
    return model(x.to(dtype))


def outputs_as(bnn: BayesianModel, case: Case, dtype: torch.dtype) -> Tensor:
    (x,), _ = case.example()
    return bnn.predict(x.to(dtype)).outputs.float()


# ------------------------------------------------------------------------------------------------ own biases


@some_cases("mlp", "cnn", "lstm", "bert", "gpt2", "test_resnet")
def test_only_sites_with_a_bias_get_one(case: Case) -> None:
    model = case.model()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    bnn = convert(model, 2, member_bias=True)
    found = {(name, weight) for name, layer in bnn.layers() for weight, site in layer.rank1.items() if site.own_bias}
    expected = {
        (name, weight)
        for name, layer in bnn.layers()
        for weight in layer.rank1
        if f"{name}.{weight.replace('weight', 'bias')}" in parameters
    }
    assert found == expected
    assert expected


def test_without_any_bias_nothing_is_added() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    plain = inspect(model, members=2).parameters_added
    assert bayesify(model, members=2, member_bias=True).report.parameters_added == plain


@every_size
@some_cases("mlp", "cnn", "lstm", "packed_gru", "bert")
@pytest.mark.parametrize("noise", ["example", "member"])
@torch.no_grad()
def test_a_bias_moves_its_own_member_alone(case: Case, members: int, noise: Any) -> None:
    """In every converted layer, in training and in prediction; the others stay bit for bit."""
    bnn = convert(case.model(), members, member_bias=True, noise=noise, posterior_scale=0.1)
    for module in bnn.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.LSTM):
            module.dropout = 0.0
    sites = {f"{name}.{w}": site for name, layer in bnn.layers() for w, site in layer.rank1.items() if site.own_bias}

    def rows() -> list[Tensor]:
        torch.manual_seed(2)
        training = call(bnn.train(), case).unflatten(0, (members, -1))
        return [training, outputs(bnn, case)[:, 0], outputs(bnn, case, samples=2, seed=6).transpose(1, 2)]

    for norm in [m for m in bnn.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.momentum = 0.0  # shared by all members here
        norm.eval()
        norm.train = lambda mode=True, norm=norm: norm  # type: ignore[method-assign]
    before = rows()
    for member in (0, members - 1):
        for name, site in list(sites.items())[:: 1 + len(sites) // 8]:
            saved = site.own_bias.offset.clone()
            site.own_bias.offset[member] += torch.linspace(1, 2, saved.shape[1])
            for a, b in zip(before, rows(), strict=True):
                moved = [not torch.equal(x, y) for x, y in zip(a, b, strict=True)]
                assert moved == [k == member for k in range(members)], name
            site.own_bias.offset.copy_(saved)
    last = list(sites.values())[-1].own_bias.offset
    last[members - 1] += 1.5
    for a, b in zip(before, rows(), strict=True):
        shift = torch.zeros(members, *[1] * (a.dim() - 1))
        shift[members - 1] = 1.5
        torch.testing.assert_close(b, a + shift, rtol=1e-4, atol=1e-4)


@some_cases("mlp", "lstm", "gpt2", "cnn")
@torch.no_grad()
def test_original_checkpoint_loads_strictly(case: Case) -> None:
    """It replaces the shared biases; the members' offsets stay."""
    other = case.model(seed=3)
    bnn = convert(case.model(), 2, member_bias=True, **NEUTRAL)
    bnn.model.load_state_dict(other.state_dict(), strict=True)
    found = outputs(bnn, case)[:, 0]
    for member in range(2):
        torch.testing.assert_close(found[member], call(other, case), rtol=1e-4, atol=1e-5)
    disturb(bnn)
    offsets = {n: p.clone() for n, p in bnn.named_parameters() if n.endswith("offset")}
    bnn.model.load_state_dict(case.model().state_dict(), strict=True)
    assert all(torch.equal(p, offsets[n]) for n, p in bnn.named_parameters() if n in offsets)


def test_include_selects_the_biases_too() -> None:
    bnn = convert(BY_NAME["mlp"].model(), 2, member_bias=True, include=("0", "4"))
    assert [n for n, m in bnn.model.named_modules() if isinstance(m, MemberVector)] == [
        "0.rank1.weight.own_bias",
        "4.rank1.weight.own_bias",
    ]


# ------------------------------------------------------------------------------------------------ own batch norms

NORMS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "1d": (lambda **k: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **k), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "1d-sequences": (
        lambda **k: nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4, **k), nn.Flatten(), nn.Linear(12, 2)),
        (3, 4),
    ),
    "2d": (
        lambda **k: nn.Sequential(
            nn.Conv2d(3, 4, 2, bias=False), nn.BatchNorm2d(4, **k), nn.ReLU(), nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4, **k), nn.Flatten(), nn.Linear(16, 2),
        ),
        (3, 3, 3),
    ),
    "3d": (
        lambda **k: nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4, **k), nn.Flatten(), nn.Linear(32, 2)),
        (3, 3, 3, 3),
    ),
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.3},
    "cumulative": {"momentum": None},
    "no-affine": {"affine": False},
    "no-statistics": {"track_running_stats": False},
}


def batch_norms(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def alone(model: nn.Module, bnn: BayesianModel) -> list[nn.Module]:
    """K plain copies of the network; the k-th has scale and shift of member k."""
    copies = [copy.deepcopy(model) for _ in range(bnn.members)]
    with torch.no_grad():
        for member, plain in enumerate(copies):
            for name, norm in batch_norms(plain).items():
                own = bnn.model.get_submodule(name).rank1
                for vector in ("weight", "bias"):
                    if getattr(norm, vector) is not None:
                        getattr(norm, vector).add_(getattr(own, vector).offset[member])
    return copies


def check_against_plain_norms(model: nn.Module, members: int, batches: list[Tensor], expansion: Any) -> None:
    """Training steps, statistics and gradients of K members against K plain networks, each with its rows only."""
    tolerance = 1e-6  # what members have of their own is float32
    bnn = convert(copy.deepcopy(model), members, member_batch_norm=True, **NEUTRAL)
    bnn.expansion = expansion
    with torch.no_grad():
        for module in bnn.modules():
            if isinstance(module, MemberVector):
                module.offset.normal_(0, 0.3)
    plain = alone(model, bnn)
    start = {n: b.clone() for n, b in model.named_buffers()}
    for x in batches:
        bnn.train()
        found = bnn(x).unflatten(0, (members, -1))
        parts = x.chunk(members) if expansion == "partition" else [x] * members
        expected = torch.stack([network.train()(part) for network, part in zip(plain, parts, strict=True)])
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        for name, norm in batch_norms(bnn.model).items():
            for statistic in ("running_mean", "running_var", "num_batches_tracked"):
                if getattr(norm, statistic) is None:
                    assert getattr(norm.rank1, statistic) is None
                    continue
                wanted = [getattr(network.get_submodule(name), statistic) for network in plain]
                own = getattr(norm.rank1, statistic)
                torch.testing.assert_close(own, torch.stack(wanted), rtol=tolerance, atol=tolerance)
                assert torch.equal(getattr(norm, statistic), start[f"{name}.{statistic}"]), "the shared ones stay"
    projection = torch.randn_like(found)
    for loss in ((found * projection).sum(), (expected * projection).sum()):
        loss.backward()
    for name, norm in batch_norms(bnn.model).items():
        for vector in ("weight", "bias"):
            if getattr(norm, vector) is None:
                continue
            wanted = torch.stack([getattr(network.get_submodule(name), vector).grad for network in plain])
            own = getattr(norm.rank1, vector).offset.grad
            atol = tolerance * max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(own.double(), wanted, rtol=10 * tolerance, atol=atol)
            torch.testing.assert_close(getattr(norm, vector).grad, wanted.sum(0), rtol=10 * tolerance, atol=atol)
    x = batches[0]
    with torch.no_grad():
        expected = torch.stack([network.eval()(x) for network in plain])
        found = bnn.predict(x).outputs[:, 0]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(bnn.predict(x, member_chunk=1).outputs[:, 0], found, rtol=1e-6, atol=1e-6)
        for member in range(members):
            merged = bnn.merge(member).eval()
            torch.testing.assert_close(merged(x), expected[member], rtol=tolerance, atol=tolerance)


@every_size
@pytest.mark.parametrize("expansion", ["replicate", "partition"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_against_plain_ones(name: str, setting: str, expansion: Any, members: int) -> None:
    build, shape = NORMS[name]
    model = build(**SETTINGS[setting]).double()
    batches = [torch.randn(12, *shape, dtype=torch.float64) * (step + 1) + step for step in range(3)]
    check_against_plain_norms(model, members, batches, expansion)


@every_size
@pytest.mark.parametrize("expansion", ["replicate", "partition"])
def test_batch_norm_of_timm_with_its_activation(members: int, expansion: Any) -> None:
    model = BY_NAME["test_efficientnet"].model().double()
    assert {type(norm).__name__ for norm in batch_norms(model).values()} == {"BatchNormAct2d"}
    batches = [torch.randn(6, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    check_against_plain_norms(model, members, batches, expansion)


@every_size
@torch.no_grad()
def test_factors_reach_the_statistics_of_their_member(members: int) -> None:
    """With factors apart, each member's norm sees what that member's own layers give it."""
    bnn = convert(NORMS["1d"][0](), members, member_batch_norm=True, posterior="deterministic").train()
    x = torch.randn(8, 3)
    bnn(x)
    layer, norm = bnn.model[0], bnn.model[1].rank1
    s, r = layer.rank1["weight"].s.loc, layer.rank1["weight"].r.loc
    for member in range(members):
        y = (x * s[member]) @ layer.weight.t() * r[member] + layer.bias
        torch.testing.assert_close(norm.running_mean[member], 0.1 * y.mean(0))
        torch.testing.assert_close(norm.running_var[member], 0.9 + 0.1 * y.var(0))
    assert norm.num_batches_tracked.tolist() == [1] * members


@torch.no_grad()
def test_frozen_norms_use_their_members_statistics_while_the_rest_trains() -> None:
    bnn = disturb(convert(NORMS["2d"][0](), 3, member_batch_norm=True, **NEUTRAL)).eval()
    x = torch.randn(4, 3, 3, 3)
    expected = bnn.predict(x).outputs[:, 0].flatten(0, 1)
    bnn.train()
    for norm in batch_norms(bnn.model).values():
        norm.eval()
    before = {n: b.clone() for n, b in bnn.named_buffers()}
    torch.testing.assert_close(bnn(x), expected)
    assert all(torch.equal(b, before[n]) for n, b in bnn.named_buffers())


@every_size
@torch.no_grad()
def test_original_checkpoint_resets_the_statistics_of_all_members(members: int) -> None:
    case = BY_NAME["test_efficientnet"]
    other = case.model(seed=3)
    bnn = convert(case.model(), members, member_batch_norm=True, **NEUTRAL).train()
    call(bnn, case)
    bnn.model.load_state_dict(other.state_dict(), strict=True)
    for name, norm in batch_norms(bnn.model).items():
        for statistic in ("running_mean", "running_var", "num_batches_tracked"):
            for own in getattr(norm.rank1, statistic):
                assert torch.equal(own, getattr(other.get_submodule(name), statistic))
    found = outputs(bnn, case)[:, 0]
    for member in range(members):
        torch.testing.assert_close(found[member], call(other, case), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "plain-mapping"])
@torch.no_grad()
def test_other_checkpoints_keep_the_statistics(metadata: bool) -> None:
    """One of another layer alone, and one of the Bayesian model itself."""
    bnn = disturb(convert(NORMS["2d"][0](), 3, member_batch_norm=True))
    before = {n: b.clone() for n, b in bnn.named_buffers()}
    head = bnn.model.state_dict()
    for name in list(head):
        if not name.startswith("6."):
            del head[name]
    bnn.model.load_state_dict(head if metadata else dict(head), strict=False)
    assert all(torch.equal(b, before[n]) for n, b in bnn.named_buffers())
    state = bnn.state_dict()
    fresh = convert(NORMS["2d"][0](), 3, member_batch_norm=True)
    fresh.load_state_dict(state if metadata else dict(state), strict=True)
    assert_same_state(fresh, bnn)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["0.1", "1.1", "2"]),
        ({"include": ("0",)}, ["0.1"]),
        ({"exclude": ("1.*",)}, ["0.1", "2"]),
        ({"include": ("0", "1"), "exclude": ("0",)}, ["1.1"]),
        ({"include": ("3",)}, []),
    ],
    ids=["all", "include", "exclude", "both", "none"],
)
def test_patterns_select_norms_too(options: dict[str, Any], expected: list[str]) -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    model = nn.Sequential(block(), block(), nn.BatchNorm1d(3), nn.Linear(3, 2))
    bnn = bayesify(model, members=2, member_batch_norm=True, **options)
    assert [n for n, m in bnn.model.named_modules() if isinstance(m, MemberBatchNorm)] == expected
    assert any(f"each member's own: {len(expected)}" in note for note in bnn.report.notes)
    x = torch.randn(4, 3)
    bnn.train()(x)
    for name, norm in batch_norms(bnn.model).items():
        assert norm.num_batches_tracked.item() == (name not in expected)


def test_rows_that_are_no_multiple_of_the_members_are_refused() -> None:
    bnn = convert(NORMS["1d"][0](), 3, member_batch_norm=True, noise="member", factors="outputs").train()
    bnn(torch.randn(4, 3))
    norm = bnn.model[1]
    with pytest.raises(BayesifyError, match="a batch norm of 3 members got 4 rows"):
        norm(torch.randn(4, 4))


def test_failed_conversion_leaves_norms_as_they_were() -> None:
    model = NORMS["2d"][0]()
    model[4].rank1 = None
    types = [type(module) for module in model.modules()]
    with pytest.raises(ConversionError, match="already has an attribute named rank1"):
        bayesify(model, members=2, member_batch_norm=True)
    assert [type(module) for module in model.modules()] == types
    assert not any(isinstance(module, Added) for module in model.modules())


@pytest.mark.parametrize("options", [OWN, {"perturbation": "additive"}], ids=["own-parts", "additive"])
def test_example_inputs_check_the_conversion(options: dict[str, Any]) -> None:
    """The check passes and leaves no trace in statistics or parameters."""
    case = BY_NAME["test_efficientnet"]
    model, (args, _) = case.model(), case.example()
    bnn = convert(model, 3, example_inputs=args[0], **options)
    unchecked = convert(case.model(), 3, **options)
    assert_same_state(bnn, unchecked)


# ------------------------------------------------------------------------------------------------ added factors

ADDITIVE = {"perturbation": "additive"}


@every_size
@some_cases("mlp", "cnn", "test_efficientnet", "bert", "gpt2", "lstm", "packed_gru")
@torch.no_grad()
def test_added_factors_at_zero_reproduce_the_network(case: Case, members: int) -> None:
    model = case.model()
    expected = call(model, case)
    bnn = bayesify(model, members=members, init="ones", posterior_scale=0.0, **ADDITIVE)
    for samples in (None, 1):
        for member in outputs(bnn, case, samples=samples, seed=0)[:, 0]:
            assert float((member - expected).abs().max() / expected.abs().max()) <= case.tolerance


@every_size
@pytest.mark.parametrize("factors", ["both", "inputs", "outputs"])
@some_cases("mlp", "gpt2", "lstm", "packed_gru")
@torch.no_grad()
def test_added_factors_merge(case: Case, members: int, factors: Any) -> None:
    bnn = disturb(convert(case.model(), members, factors=factors, member_bias=True, **ADDITIVE), 0.1).eval()
    expected = outputs(bnn, case)[:, 0]
    for member in range(members):
        found = call(bnn.merge(member), case)
        torch.testing.assert_close(found, expected[member], rtol=1e-3, atol=1e-4 * float(found.abs().max()))
    assert not torch.allclose(expected[0], call(case.model(), case), atol=1e-2)


MERGING = {
    "unpadded": lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, dilation=2),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid", bias=False),
    "1d": lambda: nn.Conv1d(4, 6, 2, bias=False),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=4),
    "dense-no-bias": lambda: nn.Linear(7, 6, bias=False),
}
REFUSING: dict[str, Callable[[], nn.Module]] = {
    "padded": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "one-sided": lambda: nn.Conv2d(4, 6, 3, padding=(0, 1)),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
}


@every_size
@pytest.mark.parametrize("name", MERGING)
@torch.no_grad()
def test_added_factors_of_one_layer_merge(name: str, members: int) -> None:
    layer = MERGING[name]()
    bnn = disturb(convert(layer, members, member_bias=True, **ADDITIVE)).eval()
    x = torch.randn(2, 4, 7) if name == "1d" else torch.randn(2, 4, 7, 7)
    expected = bnn.predict(x).outputs[:, 0]
    for member in range(members):
        torch.testing.assert_close(bnn.merge(member)(x), expected[member], rtol=1e-4, atol=1e-5)


def assert_refuses_to_merge(bnn: BayesianModel, match: str) -> None:
    before = copy.deepcopy(bnn)
    modes = [module.training for module in bnn.modules()]
    for member in range(bnn.members):
        with pytest.raises(ConversionError, match=match):
            bnn.merge(member)
    assert_same_state(bnn, before)
    assert [module.training for module in bnn.modules()] == modes


@every_size
@pytest.mark.parametrize("name", REFUSING)
@torch.no_grad()
def test_added_inputs_under_zero_padding_refuse_to_merge(name: str, members: int) -> None:
    """Zeros at the border are not moved by s, so no bias can stand in for it; r alone merges."""
    bnn = convert(nn.Sequential(REFUSING[name](), nn.ReLU()), members, **ADDITIVE).train()
    x = torch.randn(2, 4, 5, 5)
    before = bnn.predict(x).outputs
    assert_refuses_to_merge(bnn, f"added to the inputs of {type(REFUSING[name]()).__name__} cannot be folded")
    assert torch.equal(bnn.predict(x).outputs, before)
    outward = convert(REFUSING[name](), members, factors="outputs", **ADDITIVE)
    torch.testing.assert_close(outward.merge(-1)(x), outward.predict(x).outputs[-1, 0], rtol=1e-4, atol=1e-5)


def test_added_factors_need_a_bias_to_merge_into_a_recurrent_layer() -> None:
    bnn = convert(nn.ModuleList([nn.LSTM(3, 2, bias=False)]), 2, **ADDITIVE)
    assert_refuses_to_merge(bnn, r"0: it has no bias into which added factors could be folded")


class Unrolled(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@torch.no_grad()
def test_added_factors_of_a_cell_merge(kind: type[nn.RNNCellBase], bias: bool) -> None:
    bnn = disturb(convert(Unrolled(kind(3, 2, bias=bias)), 3, member_bias=True, **ADDITIVE))
    x = torch.randn(4, 5, 3)
    expected = bnn.predict(x).outputs[:, 0]
    for member in range(3):
        torch.testing.assert_close(bnn.merge(member)(x), expected[member], rtol=1e-4, atol=1e-5)


class Backward(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, state = super().forward(input.flip(0), hx)
        return output.flip(0), state


@pytest.mark.parametrize("noise", ["example", "member"])
def test_added_factors_of_an_lstm_with_its_own_code(noise: Any) -> None:
    """Each row as torch's layer gives it with W s + r in the biases; without a bias there is no way to do it."""
    plain = Backward(3, 2)
    bnn = convert(copy.deepcopy(plain), 2, noise=noise, posterior_scale=0.1, **ADDITIVE).train()
    x = torch.randn(4, 3, 3)
    output, _ = bnn(x)
    weights = {n: p for n, p in bnn.model.named_parameters() if not n.startswith("rank1.")}
    for row in range(6):
        here = dict(weights)
        for name, site in bnn.model.rank1.items():
            s, r = (f.value()[row if noise == "example" else row // 3] for f in (site.s, site.r))
            here[name.replace("weight", "bias")] = weights[name.replace("weight", "bias")] + weights[name] @ s + r
        twin = copy.deepcopy(plain)
        twin.load_state_dict(here)
        torch.testing.assert_close(output[:, row], twin(x[:, [row % 3]])[0][:, 0], rtol=1e-4, atol=1e-5)
    without = convert(Backward(3, 2, bias=False), 2, **ADDITIVE)
    with pytest.raises(BayesifyError, match="Backward has no bias that added factors could be folded into"):
        without(x)


# ------------------------------------------------------------------------------------------------ the config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perturbation": "subtractive"}, "perturbation='subtractive' is unknown; expected one of 'multiplicative'"),
        ({"factors": "input"}, "factors='input' is unknown; expected one of 'both', 'inputs', 'outputs'"),
        ({"member_bias": 1}, "member_bias must be True or False; found 1"),
        ({"member_batch_norm": "yes"}, "member_batch_norm must be True or False; found 'yes'"),
        ({"member_bias": None}, "member_bias must be True or False; found None"),
        ({"spread_jitter": -0.1}, "spread_jitter must be finite and not negative; found -0.1"),
        ({"spread_jitter": float("inf")}, "spread_jitter must be finite"),
        ({"prior_loc": float("nan")}, "prior_loc must be finite"),
        ({"prior_loc": True}, "prior_loc must be finite; found True"),
        ({**ADDITIVE, "posterior": "log-normal", "prior": "log-normal"}, "needs factors around 0"),
        ({**ADDITIVE, "posterior": "half-cauchy", "prior": "half-cauchy"}, "needs factors around 0"),
        ({"init": "random-sign", "posterior": "log-normal", "prior": "log-normal"}, "cannot reach"),
    ],
    ids=str,
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rank1Config(**options)
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=message):
        bayesify(model, **options)
    assert type(model[0]) is nn.Linear


def test_options_are_kept_in_files_only_where_they_differ() -> None:
    config = Rank1Config(**OWN, **ADDITIVE, factors="inputs")
    written = config.non_defaults()
    assert written == {**OWN, **ADDITIVE, "factors": "inputs"}
    assert Rank1Config.from_dict(written) == config
    assert (config.neutral, config.prior_location) == (0.0, 0.0)


# ------------------------------------------------------------------------------------------------ training


@every_size
def test_training_the_factors_trains_own_parts(members: int) -> None:
    """train="factors" freezes the slow weights and moves every member's offsets and statistics, without decay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    bnn = bayesify(model, members=members, **OWN)
    x = torch.randn(16, 3)
    data = [(row, int(row.sum() > 0)) for row in x]
    config = FineTuneConfig(train="factors", epochs=1, batch_size=8, weight_decay=10.0, learning_rate=1e-2, warmup=0.0)
    before = {n: p.detach().clone() for n, p in bnn.named_parameters()}
    select_trained(bnn, config)
    slow = {n for n, _ in bnn.slow_parameters()}
    offsets = {n for n, _ in bnn.named_parameters() if n.endswith("offset")}
    assert len(offsets) == 4
    for name, parameter in bnn.named_parameters():
        assert parameter.requires_grad == (name.removeprefix("model.") not in slow), name
    FineTuner(bnn, data, config=config, progress=False).fit()
    for name, parameter in bnn.named_parameters():
        if name in offsets:
            assert ((parameter - before[name]).abs().amax(1) > 1e-5).all(), name
            assert parameter.abs().max() < 0.2
        elif name.removeprefix("model.") in slow:
            assert torch.equal(parameter, before[name]), name
    assert bnn.model[1].rank1.num_batches_tracked.tolist() == [2] * members


def test_patterns_may_name_a_norm_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3))
    bnn = bayesify(model, members=2, member_batch_norm=True, exclude=("1",))
    assert [isinstance(layer, MemberBatchNorm) for layer in bnn.model] == [False, False, False, False, True]
    assert set(bnn.report.converted) == {"0", "3"}
    with pytest.raises(ConversionError, match="the pattern '1' matches no layer"):
        bayesify(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), exclude=("1",))
