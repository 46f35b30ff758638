"""Fused models: the same numbers as the Bayesian model, from plain networks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import BY_NAME, Case, revive, tensor
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import DynamicCache

from bayesify import (
    BayesianModel,
    BayesifyError,
    ConfigError,
    ConversionError,
    DataError,
    TrainingError,
    bayesify,
    from_pretrained,
)
from bayesify.errors import FormatError
from bayesify.evaluation import evaluate
from bayesify.fused import FusedModel, Weights
from bayesify.hub import load_base, load_model, origin_of, save_timm_folder
from bayesify.layers import Rank1Layer

FAMILIES = [
    "mlp",
    "cnn",
    "resnet18",
    "convnext_atto",
    "vit_tiny",
    "bert",
    "gpt2",
    "t5",
    "torch_encoder",
    "lstm",
    "packed_gru",
]
both_forms = pytest.mark.parametrize("weights", ["copies", "shared"])


def convert(model: nn.Module, members: int = 2, **options: Any) -> BayesianModel:
    """Members that differ clearly, also in what they have of their own."""
    torch.manual_seed(7)
    bnn = bayesify(model, members=members, init="normal", init_scale=0.3, **options).eval()
    with torch.no_grad():
        for name, parameter in bnn.named_parameters():
            if name.endswith("offset"):
                parameter.normal_(0, 0.3)
        for name, buffer in bnn.named_buffers():
            if name.endswith("rank1.running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("rank1.running_var"):
                buffer.uniform_(0.5, 2.0)
    return bnn


def inputs_of(case: Case) -> Any:
    args, kwargs = case.example()
    return kwargs or args


def called(model: Any, inputs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def predicted(model: Any, inputs: Any, **options: Any) -> Tensor:
    if isinstance(inputs, dict):
        return model.predict(**inputs, **options).outputs
    return model.predict(*inputs, **options).outputs


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def efficient() -> nn.Module:
    """Convolutions followed by timm's batch norm with an activation in it, depth-wise ones among them."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=5)
    revive(model)
    return model.eval()


# ------------------------------------------------------------------------------------------------ exactness


@both_forms
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_bayesian_model_at_posterior_means(name: str, weights: Weights) -> None:
    case = BY_NAME[name]
    inputs = inputs_of(case)
    bnn = convert(case.model(), members=3)
    expected, members = called(bnn, inputs), predicted(bnn, inputs)
    fused = bnn.fuse(weights=weights, example_inputs=inputs)
    found = called(fused, inputs)
    assert type(found) is type(expected)
    assert error(tensor(found), tensor(expected)) <= 1e-5
    assert predicted(fused, inputs).shape[:2] == (3, 1)
    assert error(predicted(fused, inputs), members) <= 1e-5
    assert (fused.members, fused.samples, fused.weights) == (3, 1, weights)


@both_forms
@pytest.mark.parametrize("name", ["cnn", "vit_tiny", "distilbert", "lstm"])
def test_draws_are_those_of_noise_per_member(name: str, weights: Weights) -> None:
    case = BY_NAME[name]
    inputs = inputs_of(case)
    bnn = convert(case.model(), noise="member", posterior_scale=0.2)
    expected = predicted(bnn, inputs, samples=3, seed=5)
    fused = bnn.fuse(samples=3, seed=5, weights=weights, example_inputs=inputs)
    found = predicted(fused, inputs)
    assert found.shape[:2] == (2, 3)
    assert error(found, expected) <= 1e-5
    assert error(found[:, 0], found[:, 1]) > 1e-3
    assert torch.equal(predicted(fused, inputs), found), "nothing is drawn anew"
    other = bnn.fuse(samples=3, seed=6, weights=weights, example_inputs=inputs)
    assert error(predicted(other, inputs), found) > 1e-3


@both_forms
@pytest.mark.parametrize(
    "options",
    [
        {"member_bias": True, "member_batch_norm": True},
        {"factors": "inputs"},
        {"factors": "outputs"},
        {"include": ["bn1", "blocks.1"], "member_batch_norm": True},
        {"include": ["blocks.1"]},
    ],
    ids=str,
)
def test_batch_norms_become_part_of_their_layer(options: dict[str, Any], weights: Weights) -> None:
    bnn = convert(efficient(), **options)
    images = (torch.randn(3, 3, 160, 160),)
    expected = predicted(bnn, images)
    fused = bnn.fuse(weights=weights)
    assert error(predicted(fused, images), expected) <= 1e-5
    norms = [name for name, module in bnn.model.named_modules() if isinstance(module, _BatchNorm)]
    if "bn1" in options.get("include", ()):  # each member's own, after a layer that all share
        norms.remove("bn1")
    assert sorted(fused.norms) == sorted(norms)
    left = {n.removeprefix("networks.")[2:] for n, module in fused.named_modules() if isinstance(module, _BatchNorm)}
    assert not left & set(norms)
    assert sum(isinstance(module, nn.ReLU) for module in fused.networks[0].modules()) == sum(
        isinstance(module, nn.ReLU) for module in bnn.model.modules()
    )


def test_added_factors_and_weights_made_by_code() -> None:
    for model, options in ((BY_NAME["cnn"].model(), {"perturbation": "additive"}), (BY_NAME["test_nfnet"].model(), {})):
        bnn = convert(model, **options)
        images = (torch.randn(2, 3, 64, 64),)
        fused = bnn.fuse(example_inputs=images)
        assert fused.weights == "shared", "cannot be folded"
        assert error(predicted(fused, images), predicted(bnn, images)) <= 1e-5
        with pytest.raises(ConversionError, match="weights='shared'"):
            bnn.fuse(weights="copies", example_inputs=images)


def test_outputs_beside_logits_and_the_loss() -> None:
    case = BY_NAME["bert"]
    bnn = convert(case.model())
    inputs = inputs_of(case) | {"labels": torch.tensor([1, 3]), "output_hidden_states": True}
    expected, found = called(bnn, inputs), called(bnn.fuse(), inputs)
    assert list(found) == list(expected)
    assert error(found.loss, expected.loss) <= 1e-5
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert error(one, other) <= 1e-5


def test_a_bare_recurrent_layer() -> None:
    for batch_first in (True, False):
        bnn = convert(nn.LSTM(4, 5, batch_first=batch_first))
        x = (torch.randn(3, 3, 4),)
        (output, state), (found, found_state) = called(bnn, x), called(bnn.fuse(example_inputs=x), x)
        assert error(found, output) <= 1e-5
        assert error(torch.stack(found_state), torch.stack(state)) <= 1e-5


# ------------------------------------------------------------------------------------------------ what is merged


class Unsafe(nn.Module):
    """Pairs that look like a layer and its batch norm, each with another use beside; and one that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.used, self.read, self.hooked, self.good = (nn.Conv2d(3, 3, 1) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(5))
        for norm in self.norms:
            nn.init.uniform_(norm.weight)  # type: ignore[arg-type]
            norm.running_mean.normal_()  # type: ignore[union-attr]
        self.hooked.register_forward_hook(lambda module, args, output: output.relu())

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.twice(self.norms[0](self.twice(x))))
        y = self.used(x)
        x = self.norms[1](y) + y
        x = self.norms[2](self.read(x)) * self.norms[2].weight.sum()
        x = self.norms[3](self.hooked(x))
        return self.norms[4](self.good(x)).mean((2, 3))


@both_forms
def test_only_a_norm_that_is_the_only_use_is_merged(weights: Weights) -> None:
    bnn = convert(Unsafe())
    x = (torch.randn(2, 3, 4, 4),)
    expected = predicted(bnn, x)
    for options in ({}, {"example_inputs": x}):
        fused = bnn.fuse(weights=weights, **options)
        assert fused.norms == ["norms.4"]
        assert error(predicted(fused, x), expected) <= 1e-5


class Reaching(nn.Module):
    """Its forward cannot be captured, and asks for what a batch norm has."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        return self.body(x).mean((2, 3)) * self.body[1].num_features


def test_what_cannot_be_captured_is_tried_or_left_alone() -> None:
    bnn = convert(Reaching())
    x = (torch.randn(2, 3, 4, 4),)
    for options in ({}, {"example_inputs": x}):
        fused = bnn.fuse(**options)
        assert fused.norms == []
        assert error(predicted(fused, x), predicted(bnn, x)) <= 1e-5


def test_copies_share_what_has_no_factors() -> None:
    bnn = convert(BY_NAME["gpt2"].model())
    for network in bnn.fuse(weights="copies").networks:
        assert not any(isinstance(module, Rank1Layer) for module in network.modules())
    fused = bnn.fuse(weights="copies", samples=2)
    assert len(fused.networks) == 4
    first = dict(fused.networks[0].named_parameters())
    sites = {f"{name}.weight" for name, _ in bnn.layers()}
    for network in fused.networks[1:]:
        for name, parameter in network.named_parameters():
            assert (parameter.data_ptr() == first[name].data_ptr()) == (name not in sites), name


def test_shared_weights_exist_once() -> None:
    bnn = convert(BY_NAME["vit_tiny"].model())
    fused = bnn.fuse(weights="shared")
    weights = dict(bnn.slow_parameters())
    own = {id(p): p for p in fused.parameters()}
    assert sum(p.numel() for p in own.values() if p.dim() > 1) < 1.1 * sum(
        p.numel() for p in weights.values() if p.dim() > 1
    )
    assert not {p.data_ptr() for p in own.values()} & {p.data_ptr() for p in bnn.parameters()}, "apart from the model's"


class Normed(nn.Module):
    """Layer norms before dense layers: handed on by a module, used twice, and read by the code."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6, bias=i != 0) for i in range(4))
        for norm in self.norms:
            nn.init.uniform_(norm.weight)  # type: ignore[arg-type]
        self.mlp = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
        self.twice, self.read, self.good = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.norms[0](x))
        y = self.norms[1](x)
        x = y + self.twice(y)
        x = self.read(self.norms[2](x)) * self.norms[2].weight
        return self.good(self.norms[3](x))


def test_layer_norms_take_the_factors_of_the_layer_after_them() -> None:
    bnn = convert(Normed(), members=2)
    x = (torch.randn(3, 6),)
    fused = bnn.fuse(weights="shared", example_inputs=x)
    assert error(predicted(fused, x), predicted(bnn, x)) <= 1e-5
    network: Any = fused.networks[0]
    without = [name for name, layer in network.named_modules() if isinstance(layer, Rank1Layer) and _s(layer) is None]
    assert without == ["mlp.0", "good"]
    assert not torch.equal(network.norms[0].weight, bnn.model.norms[0].weight)  # type: ignore[index,union-attr]


def _s(layer: Any) -> Any:
    return layer.rank1["weight"].s


def test_weights_are_copied_while_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    bnn = convert(BY_NAME["mlp"].model())
    x = (torch.randn(2, 5),)
    needed = 2 * 2 * sum(layer.weight.numel() * 4 for _, layer in bnn.layers())  # type: ignore[operator,union-attr]
    for available, expected in ((2 * needed, "copies"), (2 * needed - 1, "shared")):
        memory = type("Memory", (), {"available": available})
        monkeypatch.setattr("psutil.virtual_memory", lambda memory=memory: memory)
        assert bnn.fuse(example_inputs=x).weights == expected


# ------------------------------------------------------------------------------------------------ the model itself


@both_forms
def test_the_bayesian_model_is_not_changed(weights: Weights) -> None:
    bnn = convert(efficient(), member_batch_norm=True).train()
    bnn.model.bn1.eval()  # type: ignore[union-attr]
    state = copy.deepcopy(bnn.state_dict())
    facts = [(name, id(p), p.requires_grad) for name, p in bnn.named_parameters()]
    flags = [(name, type(module), module.training) for name, module in bnn.named_modules()]
    fused = bnn.fuse(samples=2, weights=weights)
    x = (torch.randn(2, 3, 160, 160),)
    before = predicted(fused, x)
    assert [(name, id(p), p.requires_grad) for name, p in bnn.named_parameters()] == facts
    assert [(name, type(module), module.training) for name, module in bnn.named_modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in bnn.state_dict().items())
    with torch.no_grad():
        for parameter in bnn.parameters():
            parameter.add_(1.0)
    assert torch.equal(predicted(fused, x), before), "nor does it follow the model"


def test_a_copy_computes_with_its_own_weights() -> None:
    x = (torch.randn(2, 5),)
    fused = convert(BY_NAME["mlp"].model()).fuse(example_inputs=x)
    other = copy.deepcopy(fused)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert called(fused, x).std() > 0
    assert error(called(other, x), called(convert(BY_NAME["mlp"].model()), x)) > 1e-3


def test_it_is_evaluated_as_the_bayesian_model_is() -> None:
    torch.manual_seed(0)
    bnn = bayesify(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), members=2)
    batches = [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(2)]
    bnn.eval()(batches[0][0])
    reports = [evaluate(model, batches, progress=False) for model in (bnn, bnn.fuse())]
    assert (reports[0].members, reports[0].samples) == (reports[1].members, reports[1].samples) == (2, 1)
    for metric, value in reports[0].metrics["bayesian"].items():
        assert reports[1].metrics["bayesian"][metric] == pytest.approx(value, abs=1e-5)
    with pytest.raises(ConfigError, match="draws folded in"):
        evaluate(bnn.fuse(), batches, samples=3, progress=False)


def test_it_is_for_inference_alone() -> None:
    bnn = convert(BY_NAME["gpt2"].model())
    fused = bnn.fuse()
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert fused.eval() is fused
    with pytest.raises(TrainingError, match="fuse it anew"):
        fused.train()
    assert not fused.training
    with pytest.raises(DataError, match="use_cache"):
        fused(**inputs_of(BY_NAME["gpt2"]), use_cache=True)
    with pytest.raises(DataError, match="past_key_values"):
        fused(**inputs_of(BY_NAME["gpt2"]), past_key_values=DynamicCache())


def test_options_that_have_no_meaning() -> None:
    bnn = convert(BY_NAME["mlp"].model())
    x = torch.randn(2, 5)
    with pytest.raises(DataError, match="samples must be at least 1; found 0"):
        bnn.fuse(samples=0)
    with pytest.raises(ConfigError, match="found 'both'"):
        bnn.fuse(weights="both")  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match="fails on example_inputs"):
        bnn.fuse(example_inputs=torch.randn(2, 4))
    bnn.report.unsettled = True
    with pytest.raises(ConversionError, match="call the model once"):
        bnn.fuse()
    bnn(x)
    bnn.fuse()
    bnn.unload()
    with pytest.raises(BayesifyError, match="unloaded"):
        bnn.fuse(example_inputs=x)


# ------------------------------------------------------------------------------------------------ files


@both_forms
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, weights: Weights) -> None:
    save_timm_folder(efficient(), tmp_path / "base")
    base = load_base(tmp_path / "base", label_names=list("abcde"))
    x = (torch.randn(2, 3, 160, 160),)
    plain = called(base.model, x)
    bnn = bayesify(base.model, members=2, init="normal", init_scale=0.3)
    bnn.origin, bnn.label_names = origin_of(bnn.model, base), base.label_names
    fused = bnn.fuse(samples=2, weights=weights)  # a seed of its own, which is kept
    expected = predicted(fused, x)
    assert error(expected.mean((0, 1)), plain) > 1e-2
    folder = fused.save_pretrained(tmp_path / "out")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".md"}
    again = from_pretrained(folder)
    assert isinstance(again, FusedModel)
    assert (again.weights, again.settings, again.norms) == (weights, fused.settings, fused.norms)
    assert torch.equal(predicted(again, x), expected)
    assert torch.equal(called(again, x), called(fused, x))
    assert isinstance(load_model(folder)[0], BayesianModel), "what the command line works with"
    bnn.save_pretrained(folder)
    assert isinstance(from_pretrained(folder), BayesianModel)


@pytest.mark.parametrize("value", ['{"samples": "all"}', '{"speed": 1}', "3"])
def test_wrong_options_in_a_file(tmp_path: Path, value: str) -> None:
    bnn = convert(BY_NAME["mlp"].model())
    bnn.fuse(example_inputs=torch.randn(2, 5)).save_pretrained(tmp_path)
    path = tmp_path / "bayesify_config.json"
    text = path.read_text()
    start = text.index('"fused": ') + len('"fused": ')
    path.write_text(text[:start] + value + "}")
    with pytest.raises(FormatError, match="field fused"):
        from_pretrained(tmp_path, base_model=BY_NAME["mlp"].model())


# ------------------------------------------------------------------------------------------------ exporters


def larger(case: Case) -> Any:
    """Five examples of the case."""
    inputs = inputs_of(case)
    if isinstance(inputs, dict):
        return {name: torch.cat([value, value.flip(0), value])[:5] for name, value in inputs.items()}
    return tuple(torch.cat([value, value.flip(0), value])[:5] for value in inputs)


def arguments(inputs: Any) -> tuple[Any, Any]:
    return ((), inputs) if isinstance(inputs, dict) else (inputs, {})


@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")  # of any LSTM of torch
@both_forms
@pytest.mark.parametrize("name", ["cnn", "distilbert", "lstm"])
def test_export_with_any_number_of_examples(name: str, weights: Weights) -> None:
    case = BY_NAME[name]
    inputs = inputs_of(case)
    fused = convert(case.model()).fuse(weights=weights, example_inputs=inputs)
    batch: Any = {0: torch.export.Dim("batch")}
    shapes = dict.fromkeys(inputs, batch) if isinstance(inputs, dict) else tuple(batch for _ in inputs)
    with torch.no_grad():
        program = torch.export.export(fused, *arguments(inputs), dynamic_shapes=shapes)
    others = larger(case)
    assert error(tensor(called(program.module(), others)), tensor(called(fused, others))) <= 1e-5


@both_forms
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_onnx_with_any_number_of_examples(name: str, weights: Weights, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    case = BY_NAME[name]
    inputs = inputs_of(case)
    fused = convert(case.model()).fuse(weights=weights, example_inputs=inputs)
    path = tmp_path / "fused.onnx"
    torch.onnx.export(fused, inputs, path, dynamic_shapes=({0: "batch"},), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (x,) = larger(case)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert error(torch.from_numpy(found), called(fused, (x,))) <= 1e-5
