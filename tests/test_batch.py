"""Inputs and outputs that do not simply carry one row an example."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bayesify import bayesify

TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


ROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2]}


def clip() -> tuple[Any, dict[str, Any]]:
    vision = {k: TEXT[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    config = transformers.CLIPConfig(
        text_config=TEXT, vision_config={**vision, "image_size": 8, "patch_size": 4}, projection_dim=8
    )
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 60, (3, 6)), "pixel_values": torch.randn(3, 3, 8, 8)}
    return transformers.CLIPModel(config).eval(), inputs


def qwen2_vl() -> tuple[Any, dict[str, Any]]:
    """Two examples with an image of 4×4 patches each, which lie one after the other in `pixel_values`."""
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "num_key_value_heads": 1, "rope_parameters": ROPE},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        image_token_id=50,
        video_token_id=51,
        vision_start_token_id=52,
        vision_end_token_id=53,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(3, 50, (2, 10))
    ids[:, 1], ids[:, 2:6], ids[:, 6] = 52, 50, 53
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(32, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": (ids == 50).long(),
    }
    return transformers.Qwen2VLForConditionalGeneration(config).eval(), inputs


@torch.no_grad()
def test_similarities_of_contrastive_models_stay_within_a_member() -> None:
    model, inputs = clip()
    bnn = bayesify(copy.deepcopy(model), members=2, init="normal", posterior="deterministic", example_inputs=inputs)
    found = bnn.eval()(**inputs)
    members = [bnn.merge(k)(**inputs) for k in range(2)]
    for name in ("logits_per_image", "logits_per_text", "text_embeds"):
        mean = torch.stack([getattr(member, name) for member in members]).mean(0)
        torch.testing.assert_close(found[name], mean, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(members[0].logits_per_image, members[1].logits_per_image, atol=1e-3)


@torch.no_grad()
def test_images_packed_one_after_the_other_are_repeated_for_each_member() -> None:
    model, inputs = qwen2_vl()
    expected = model(**inputs).logits
    neutral = bayesify(copy.deepcopy(model), members=3, init="ones", posterior="deterministic", example_inputs=inputs)
    for member in neutral.predict(**inputs).outputs[:, 0]:
        torch.testing.assert_close(member, expected, rtol=1e-4, atol=1e-5)
    bnn = bayesify(copy.deepcopy(model), members=2, init="normal", posterior="deterministic")
    found = bnn.predict(**inputs).outputs[:, 0]
    for k in range(2):
        torch.testing.assert_close(found[k], bnn.merge(k)(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@torch.no_grad()
def test_products_on_time_first_know_where_the_batch_is() -> None:
    """XLNet turns its inputs to [time, batch] and multiplies with parameters by einsum."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "num_labels": 3}
    config = transformers.XLNetConfig(vocab_size=60, **sizes)
    model = transformers.XLNetForSequenceClassification(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs: dict[str, Any] = {"input_ids": torch.randint(3, 60, (4, 8))}
    bnn = bayesify(copy.deepcopy(model), members=2, init="normal", posterior="deterministic")
    assert {f"transformer.layer.0.rel_attn.{name}" for name in "qkvo"} <= set(bnn.report.converted)
    found = bnn.predict(**inputs).outputs[:, 0]
    assert bnn.report.batch_dims["transformer.layer.0.rel_attn.q"] == 1
    for k in range(2):
        torch.testing.assert_close(found[k], bnn.merge(k)(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


class Frames(nn.Module):
    """Three frames of each example, with features and logits of each frame, and a table that is no row of anything."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.first(x.flatten(0, 1))
        return {"logits": self.head(features), "image_hidden_states": features, "table": torch.ones(12, 2)}


@torch.no_grad()
def test_several_rows_of_an_example_are_averaged_over_members() -> None:
    torch.manual_seed(0)
    bnn = bayesify(Frames(), members=2, init_scale=0.5, task="classification").eval()
    x = torch.randn(2, 3, 4)
    members, found = [bnn.merge(k)(x) for k in range(2)], bnn(x)
    probs = torch.stack([member["logits"].softmax(-1) for member in members]).mean(0)
    torch.testing.assert_close(found["logits"].exp(), probs)
    features = torch.stack([member["image_hidden_states"] for member in members]).mean(0)
    torch.testing.assert_close(found["image_hidden_states"], features)
    assert found["table"].shape == (12, 2)
