"""Options of the objective and the optimizer: schedules, decay by meaning, temperature, several draws a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesify import ELBO, BayesianModel, ConfigError, bayesify
from bayesify.finetune import FineTuneConfig, FineTuner
from bayesify.finetune.groups import head_parameters, make_optimizer, make_schedule, parameter_groups, select_trained
from bayesify.modes import start_training


class Net(nn.Module):
    """A linear map, a norm whose parameters are called as a bias would be, a convolution and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)
        self.bias = nn.BatchNorm1d(4)
        self.kernel = nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bias(self.conv(x)).relu().transpose(1, 2)
        return self.temperature * self.head(self.kernel(x)[0][:, -1])


def converted(**options: Any) -> BayesianModel:
    torch.manual_seed(0)
    return bayesify(Net(), **{"members": 2, **options})


def examples(count: int = 16) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(3, 5, generator=generator), number % 3) for number in range(count)]


def rates(config: FineTuneConfig, steps: int) -> list[float]:
    """The learning rate of each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = make_schedule(optimizer, config, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_steps_down_at_the_milestones_after_a_warmup() -> None:
    config = FineTuneConfig(
        learning_rate=1.0, schedule="steps", milestones=(0.4, 0.8, 0.9), decay_factor=0.2, warmup=0.2
    )
    expected = [0, 0.25, 0.5, 0.75, *[1.0] * 4, *[0.2] * 8, *[0.04] * 2, *[0.008] * 2]
    assert rates(config, 20) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "late"), [("constant", [1.0, 1.0, 1.0]), ("linear", [0.375, 0.25, 0.125])], ids=["constant", "linear"]
)
def test_schedules_after_the_warmup(schedule: Any, late: list[float]) -> None:
    found = rates(FineTuneConfig(learning_rate=1.0, schedule=schedule, warmup=0.2), 10)
    assert found[:3] == pytest.approx([0.0, 0.5, 1.0])
    assert found[-3:] == pytest.approx(late)


def test_decay_goes_by_meaning_not_by_name() -> None:
    bnn = converted(member_bias=True, member_batch_norm=True)
    names = {id(p): name for name, p in bnn.model.named_parameters()}
    config = FineTuneConfig(weight_decay=0.1, weight_decay_on=("kernels", "norms"))
    groups = {group["name"]: group for group in parameter_groups(bnn, config)}
    members = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    assert members["kernels"] == {"conv.weight", "kernel.weight_ih_l0", "kernel.weight_hh_l0", "head.weight"}
    assert members["biases"] == {
        *("conv.bias", "kernel.bias_ih_l0", "kernel.bias_hh_l0", "head.bias"),
        *(f"{layer}.rank1.weight.own_bias.offset" for layer in ("conv", "head")),
        *(f"kernel.rank1.weight_{part}_l0.own_bias.offset" for part in ("ih", "hh")),
    }
    assert members["norms"] == {
        *("bias.weight", "bias.bias", "temperature"),
        *(f"bias.rank1.{name}.offset" for name in ("weight", "bias")),
    }
    assert {name for name, group in groups.items() if group["weight_decay"]} == {"kernels", "norms"}
    assert sum(len(group) for group in members.values()) == len(names)


def test_learned_priors_train_with_the_factors() -> None:
    bnn = converted(prior="trainable-std")
    names = {id(p): name for name, p in bnn.model.named_parameters()}
    groups = {g["name"]: {names[id(p)] for p in g["params"]} for g in parameter_groups(bnn, FineTuneConfig())}
    assert {"head.rank1.weight.s.prior.rho", "head.rank1.weight.s.loc"} <= groups["factors"]


def test_training_factors_trains_what_members_have_of_their_own() -> None:
    bnn = converted(member_bias=True, member_batch_norm=True)
    select_trained(bnn, FineTuneConfig(train="factors"))
    learned = {name for name, p in bnn.model.named_parameters() if p.requires_grad}
    assert learned == {name for name in dict(bnn.model.named_parameters()) if ".rank1." in name}


def test_momentum_reaches_the_optimizer() -> None:
    optimizer = make_optimizer(converted(), FineTuneConfig(optimizer="sgd", momentum=0.8))
    assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(0.8, True)}
    plain = make_optimizer(converted(), FineTuneConfig(optimizer="sgd", momentum=0.0))
    assert {group["nesterov"] for group in plain.param_groups} == {False}


def test_temperature_multiplies_the_kl_alone() -> None:
    bnn = converted().train()
    x, y = torch.randn(4, 3, 5), torch.tensor([0, 1, 2, 0])
    output = bnn(x)
    cold, plain = ELBO(bnn, 10, annealing_steps=4, kl_temperature=0.3), ELBO(bnn, 10)
    first, second = cold(output, y, step=1), plain(output, y)
    assert first.weight == pytest.approx(0.3 * 0.5)
    assert second.weight == 1.0
    torch.testing.assert_close(first.nll, second.nll)
    torch.testing.assert_close(first.loss, first.nll + 0.15 * first.kl / 10)
    assert cold(output, y).weight == 0.3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_several_draws_a_step_see_one_batch(accumulation: int) -> None:
    options = {"steps": 1, "batch_size": 4, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.1, "warmup": 0.0}
    config = FineTuneConfig(
        **options, factor_lr_multiplier=1.0, weight_decay=0.0, clip_norm=None, train_samples=3,
        accumulation=accumulation, kl_annealing=0.0, log_every=1,
    )  # fmt: skip
    bnn, seen = converted(), []
    draws = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if module.training:
            seen.append(args[0].detach().clone())
            draws.append(bnn.model.head.rank1["weight"].s.value().detach().clone())  # type: ignore[union-attr,index]

    handle = bnn.model.register_forward_hook(note)
    result = FineTuner(bnn, examples(), None, config, progress=False).fit()  # type: ignore[arg-type]
    handle.remove()
    assert len(seen) == 3 * accumulation
    for number in range(accumulation):
        assert torch.equal(seen[3 * number], seen[3 * number + 2]), "three draws see one batch"
    assert not torch.equal(draws[0], draws[1])
    assert result.history[0]["loss"] == pytest.approx(
        result.history[0]["nll"] + result.history[0]["kl"] / len(examples()), rel=1e-5
    )


def test_draws_of_spread_zero_change_nothing() -> None:
    """With factors that do not vary, three draws are the step of one."""

    def run(samples: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(15, 3))
        bnn = bayesify(net, members=2, posterior="deterministic")
        config = FineTuneConfig(steps=3, batch_size=4, train_samples=samples)
        FineTuner(bnn, examples(), None, config, progress=False).fit()  # type: ignore[arg-type]
        return bnn.state_dict()

    one, three = run(1), run(3)
    for name in one:
        torch.testing.assert_close(one[name], three[name], rtol=1e-4, atol=1e-5)


def test_annealing_may_end_below_one() -> None:
    bnn = converted()
    config = FineTuneConfig(steps=4, batch_size=4, kl_annealing=2.0, log_every=1)
    history = FineTuner(bnn, examples(), None, config, progress=False).fit().history  # type: ignore[arg-type]
    assert [row["kl_weight"] for row in history if "kl_weight" in row] == pytest.approx([0.125, 0.25, 0.375, 0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "steps"}, "schedule='steps' and milestones go together"),
        ({"milestones": (0.5,)}, "schedule='steps' and milestones go together"),
        (
            {"schedule": "steps", "milestones": (1.5,)},
            "milestones must be a fraction of the steps, from 0 to 1; found 1.5",
        ),
        ({"schedule": "poly"}, "schedule='poly' is unknown"),
        (
            {"weight_decay_on": ("bn",)},
            "weight_decay_on='bn' is unknown; expected some of 'kernels', 'biases'",
        ),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\); found 1.0"),
        ({"decay_factor": 0.0}, "decay_factor must be positive"),
        ({"kl_temperature": -1.0}, "kl_temperature must be finite and not negative"),
        ({"kl_annealing": -0.5}, "kl_annealing must be finite and not negative"),
        ({"likelihood": "mixture", "expand": "partition"}, "needs every member to see every example"),
        ({"learning_rate": "1e-3"}, "learning_rate must be positive; found '1e-3'"),
        ({"learning_rate": None}, "learning_rate must be positive; found None"),
        ({"batch_size": None}, "batch_size must be a positive integer; found None"),
        ({"epochs": None}, "epochs must be a positive integer; found None"),
        ({"weight_decay_on": None}, "weight_decay_on must hold names"),
        ({"milestones": "0.5", "schedule": "steps"}, "milestones must be a fraction of the steps"),
        ({"norms_and_biases": "no"}, "norms_and_biases must be True or False"),
        ({"workers": 1.5}, "workers must be an integer"),
        ({"train_samples": 0}, "train_samples must be a positive integer"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"seed": 2**31}, "seed must be an integer from 0"),
        ({"seed": 0.5}, "seed must be an integer from 0"),
        ({"trackers": ("paper",)}, "trackers='paper' is unknown; expected some of .*tensorboard"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FineTuneConfig(**options)
    with pytest.raises(ConfigError, match="kl_temperature must not be negative"):
        ELBO(converted(), 5, kl_temperature=-0.1)


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_batch_norms_keep_their_statistics_and_train_their_scales(frozen: bool) -> None:
    bnn = bayesify(Net(), members=2)
    norm = bnn.model.bias
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 5) + 3, torch.randint(3, (8,)))
    FineTuner(bnn, data, None, FineTuneConfig(steps=2, batch_size=4, freeze_batch_norm=frozen), progress=False).fit()
    assert torch.equal(norm.running_mean, before["running_mean"]) == frozen
    assert torch.equal(norm.num_batches_tracked, before["num_batches_tracked"]) == frozen
    assert not torch.equal(norm.weight, before["weight"])


def test_frozen_batch_norms_make_rows_independent() -> None:
    bnn = bayesify(Net(), members=2, noise="member")
    start_training(bnn, freeze_batch_norm=True)
    x = torch.randn(4, 3, 5)
    torch.manual_seed(0)
    both = bnn(x)
    torch.manual_seed(0)
    alone = bnn(x[:1])
    torch.testing.assert_close(both[::4], alone)


TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = {**TINY, "image_size": 16, "patch_size": 8}


def _families() -> dict[str, tuple[Any, Any, set[str]]]:
    import transformers as t

    clip = t.CLIPConfig(text_config=TINY, vision_config=PATCHES)
    speech: Any = t.WhisperConfig(
        d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=8, decoder_ffn_dim=8, num_mel_bins=4, classifier_proj_size=4,
    )  # fmt: skip
    gpt2 = t.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20)
    wrapped = t.TimmWrapperConfig(architecture="test_resnet", num_labels=3)
    return {
        "vit": (t.ViTForImageClassification, t.ViTConfig(**PATCHES), {"classifier"}),
        "clip": (t.CLIPForImageClassification, clip, {"classifier"}),
        "whisper": (t.WhisperForAudioClassification, speech, {"projector", "classifier"}),
        "gpt2": (t.GPT2ForSequenceClassification, gpt2, {"score"}),
        "timm": (t.TimmWrapperForImageClassification, wrapped, {"timm_model.fc"}),
    }


@pytest.mark.parametrize("family", ["vit", "clip", "whisper", "gpt2", "timm"])
def test_the_head_of_a_transformers_model_trains_with_the_factors(family: str) -> None:
    build, config, expected = _families()[family]
    network = build(config)
    assert {name.rpartition(".")[0] for name in head_parameters(network)} == expected
    bnn = bayesify(network, members=2)
    select_trained(bnn, FineTuneConfig(train="factors"))
    learned = {name.rpartition(".")[0] for name, p in bnn.slow_parameters() if p.requires_grad}
    assert learned == expected
