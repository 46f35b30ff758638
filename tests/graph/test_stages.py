"""Where factors begin: the stages of networks, and the sites that they select."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from bayesify import bayesify, inspect
from bayesify.errors import ConfigError, ConversionError
from bayesify.graph import stages

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
T5_SIZES = {"num_layers": 3, "d_model": 16, "d_ff": 24, "num_heads": 2, "d_kv": 8}
VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2}

BUILD: dict[str, tuple[Callable[[], nn.Module], str, set[str]]] = {
    "resnet": (lambda: timm.create_model("resnet18"), "layer4", {"fc"}),
    "inception": (lambda: timm.create_model("inception_v3"), "Mixed_7c", {"fc"}),
    "convnext": (lambda: timm.create_model("convnext_atto"), "stages.3", {"head.fc"}),
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", **VIT), "blocks.2", {"head"}),
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(**SIZES, vocab_size=50)),
        "bert.encoder.layer.2",
        {"bert.pooler.dense", "classifier"},
    ),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=50)), "model.layers.2", {"lm_head"}),
    "t5": (
        lambda: T5ForConditionalGeneration(T5Config(**T5_SIZES, vocab_size=50)),
        "decoder.block.2",
        {"lm_head"},
    ),
}


@pytest.mark.parametrize("name", BUILD)
def test_the_last_stage_and_what_comes_after_it(name: str) -> None:
    build, last, head = BUILD[name]
    model = build()
    assert stages(model)[-1] == last
    everything = list(inspect(model).converted)
    chosen = [site for site in everything if site.startswith(f"{last}.")]
    assert chosen
    assert set(inspect(model, sites="head").converted) == head
    assert set(inspect(model, sites="last-stage").converted) == {*chosen, *head}
    assert set(inspect(model, sites=last).converted) == {*chosen, *head}
    assert set(inspect(model, sites="all").converted) == set(everything)


def test_a_network_without_stages_has_a_head() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4), nn.Linear(4, 2)

    assert stages(Recurrent()) == []
    assert list(inspect(Recurrent(), sites="head").converted) == ["head"]
    with pytest.raises(ConversionError, match=r"numbered blocks; found none in Recurrent.*lstm, head"):
        inspect(Recurrent(), sites="last-stage")


def test_sites_and_patterns_select_together() -> None:
    model = timm.create_model("resnet18")
    report = inspect(model, sites="layer4", exclude=("fc",), include=("*.conv1", "fc"))
    assert set(report.converted) == {"layer4.0.conv1", "layer4.1.conv1"}
    assert report.skipped["layer3.0.conv1"] == "not selected by sites='layer4'"


def test_norms_of_members_begin_there_too() -> None:
    bnn = bayesify(timm.create_model("resnet18"), sites="layer4", member_batch_norm=True)
    own = [name for name, module in bnn.model.named_modules() if type(module).__name__.startswith("Member")]
    assert own
    assert all("layer4" in name for name in own)


def test_unknown_places_are_refused() -> None:
    model = timm.create_model("resnet18")
    with pytest.raises(ConversionError, match=r"sites='layer5' is no module of ResNet.*layer4"):
        bayesify(model, sites="layer5")
    with pytest.raises(ConfigError, match="sites must be"):
        bayesify(model, sites=("layer4",))
    assert not any("rank1" in name for name, _ in model.named_modules())


@torch.no_grad()
def test_what_comes_before_is_computed_once() -> None:
    bnn = bayesify(timm.create_model("resnet18", num_classes=5), members=3, sites="last-stage").eval()
    rows: dict[str, int] = {}
    for name in ("layer3", "layer4"):
        bnn.model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: rows.update({name: len(o)}))
    x = torch.randn(2, 3, 32, 32)
    bnn(x)  # the first call looks whether members may part so late
    bnn.predict(x, member_chunk=3)
    assert rows == {"layer3": 2, "layer4": 6}
