"""Recipes: the published constants, and that what is given beside a recipe wins."""

from __future__ import annotations

import dataclasses
import math

import pytest
import timm
import torch
from torch import nn

from bayesify import ConfigError, Rank1Config, bayesify, inspect
from bayesify.finetune import FineTuneConfig
from bayesify.recipes import RECIPES, recipe


def test_resnet50_has_the_published_size() -> None:
    """26.0 M parameters at K = 4 (paper, ImageNet table): factors, their spreads, and a bias a member in the head."""
    report = inspect(timm.create_model("resnet50"), RECIPES["imagenet-gaussian"].rank1)
    assert report.parameters == 25_557_032
    assert report.parameters_added == 4 * (2 * (24_579 + 27_560) + 1000)
    assert round((report.parameters + report.parameters_added) / 1e6, 1) == 26.0


def test_the_kl_at_the_start_is_that_of_the_public_code() -> None:
    """33 nats an example on ImageNet: each of the 25 % of means at −1 costs 800 nats under N(1, 0.05²)."""
    torch.manual_seed(0)
    bnn = bayesify(timm.create_model("resnet50"), RECIPES["imagenet-gaussian"].rank1)
    assert bnn.kl().item() / 1_281_167 == pytest.approx(33, rel=0.03)


def test_published_schedules() -> None:
    cifar, imagenet = RECIPES["cifar10-gaussian"].tuning, RECIPES["imagenet-gaussian"].tuning
    assert [round(250 * m) for m in cifar.milestones] == [100, 200, 225]
    assert [round(135 * m) for m in imagenet.milestones] == [45, 90, 120]
    assert (250 * cifar.kl_annealing, 135 * imagenet.kl_annealing) == pytest.approx((200, 90))
    retinopathy = RECIPES["retinopathy"].tuning
    assert min(1.0, 1 / retinopathy.kl_annealing) == pytest.approx(0.45)
    rho = math.log(math.expm1(RECIPES["vit-last-blocks"].rank1.spread))
    assert rho == pytest.approx(-3.0, abs=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_converts_and_differs_from_the_defaults(name: str) -> None:
    rank1 = dataclasses.replace(RECIPES[name].rank1, include=())
    torch.manual_seed(0)
    bnn = bayesify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)), rank1)
    assert rank1 != Rank1Config()
    assert RECIPES[name].tuning != FineTuneConfig()
    signs = torch.cat([factor.loc.flatten() for _, _, factor in bnn.factors()]).sign()
    if rank1.init == "random-sign":
        assert float((signs > 0).float().mean()) == pytest.approx(rank1.sign_probability, abs=0.06)
    assert bnn.predict(torch.randn(2, 64), samples=RECIPES[name].samples).probs.isfinite().all()


def test_last_blocks_only() -> None:
    vit = timm.create_model("vit_large_patch32_224", num_classes=10, embed_dim=16, num_heads=2)
    report = inspect(vit, RECIPES["vit-last-blocks"].rank1)
    assert {name.rpartition(".")[0].split(".attn")[0].split(".mlp")[0] for name in report.converted} == {
        "", "blocks.22", "blocks.23",
    }  # fmt: skip
    assert "head" in report.converted


def test_what_is_given_wins() -> None:
    base = RECIPES["cifar10-gaussian"]
    changed = base.override(members=2, epochs=3)
    assert changed.rank1 == dataclasses.replace(base.rank1, members=2)
    assert changed.tuning == dataclasses.replace(base.tuning, epochs=3)
    wider = base.override(posterior_scale=0.5).rank1
    assert (wider.spread, wider.dropout_rate) == (0.5, None)
    assert base.override(schedule="cosine").tuning.milestones == ()
    shorter = RECIPES["vit-last-blocks"].override(epochs=2).tuning
    assert (shorter.epochs, shorter.steps) == (2, None)


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="'member' is no field of Rank1Config or FineTuneConfig"):
        RECIPES["cifar10-gaussian"].override(member=2)
    with pytest.raises(ConfigError, match="there is no recipe 'imagenet'; expected one of imagenet-gaussian"):
        recipe("imagenet")


def test_deterministic_factors_are_evaluated_at_their_means() -> None:
    recipe = RECIPES["cifar10-cauchy"]
    assert recipe.samples == recipe.tuning.eval_samples == 4
    assert recipe.override(posterior="deterministic", prior="normal").samples is None
