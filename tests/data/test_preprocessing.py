import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from bayesify.data import (
    HubImagePreprocessing,
    ImagePreprocessing,
    TextPreprocessing,
    preprocessing_for,
    preprocessing_from_dict,
)
from bayesify.errors import ConfigError, DataError, FormatError


def picture(width=50, height=40, seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def vit_folder(tmp_path):
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
    )
    folder = tmp_path / "vit"
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def restored(preprocessing, folder):
    fields = json.loads(json.dumps(preprocessing.save(folder)))
    return preprocessing_from_dict(fields, folder)


def test_timm_evaluation_is_that_of_timm(tmp_path):
    model = timm.create_model("test_resnet")
    preprocessing = preprocessing_for(model, "timm", "test_resnet", "image")
    reference = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    again = restored(preprocessing, tmp_path)
    assert again == preprocessing
    assert torch.equal(again.eval_transform()(picture()), reference(picture()))


def test_timm_size_and_channels_of_the_built_model():
    model = timm.create_model("test_vit", img_size=64, in_chans=1)
    preprocessing = preprocessing_for(model, "timm", "test_vit", "image")
    assert preprocessing.input_size == (1, 64, 64)
    model(preprocessing.eval_transform()(picture())[None])
    fixed = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    with pytest.raises(DataError, match="64×64 only; found image_size=96"):
        preprocessing_for(fixed, "timm", "vit_tiny_patch16_224", "image", image_size=96)
    small = preprocessing_for(timm.create_model("test_resnet"), "timm", "test_resnet", "image", image_size=96)
    assert small.eval_transform()(picture()).shape == (3, 96, 96)


def test_training_varies_and_normalizes():
    preprocessing = ImagePreprocessing((3, 24, 24))
    transform = preprocessing.train_transform(color_jitter=0.1)
    first, second = transform(picture()), transform(picture())
    assert first.shape == (3, 24, 24)
    assert not torch.equal(first, second)
    white = preprocessing.train_transform()(Image.new("RGB", (40, 40), (255, 255, 255)))
    expected = (1 - torch.tensor(preprocessing.mean)) / torch.tensor(preprocessing.std)
    assert torch.allclose(white, expected[:, None, None].expand(3, 24, 24))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "I"])
def test_every_kind_of_picture_becomes_rgb(mode):
    gray = Image.new("L", (30, 30), 128)
    if mode in ("I;16", "I"):
        image = Image.fromarray(np.full((30, 30), 128 * 257, np.uint16 if mode == "I;16" else np.int32))
    else:
        image = gray.convert("RGB").convert(mode)
    if mode == "P":
        image.info["transparency"] = b"\x00\xff"
    preprocessing = ImagePreprocessing((3, 24, 24), mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels = preprocessing.eval_transform()(image)
    assert pixels.shape == (3, 24, 24)
    if mode not in ("1", "P", "CMYK"):
        assert torch.allclose(pixels, torch.tensor(128 / 255), atol=0.01)


def test_hub_image_processor_round_trip(vit_folder, tmp_path):
    model = ViTForImageClassification.from_pretrained(vit_folder)
    preprocessing = preprocessing_for(model, "transformers", vit_folder, "image", image_size=24)
    assert isinstance(preprocessing, HubImagePreprocessing)
    target = tmp_path / "saved"
    again = restored(preprocessing, target)
    reference = ViTImageProcessor(size={"height": 24, "width": 24})(picture(), return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(again.eval_transform()(picture()), reference, atol=1e-6)
    transform = again.train_transform(color_jitter=0.1)
    first, second = transform(picture()), transform(picture())
    assert first.shape == second.shape == (3, 24, 24)
    assert not torch.equal(first, second)


def test_a_transformers_image_model_without_source():
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    config.patch_size = 8
    model = ViTForImageClassification(config).eval()
    preprocessing = preprocessing_for(model, "transformers", None, "image")
    batch = preprocessing.collate([preprocessing.eval_transform()(picture())] * 2, [0, 1])
    assert torch.isfinite(model(**batch).loss)


def test_texts_pad_to_the_longest_of_the_batch(minilm, tmp_path):
    model = BertForSequenceClassification(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3)
    )
    preprocessing = preprocessing_for(model, "transformers", minilm, "text", max_length=8)
    assert isinstance(preprocessing, TextPreprocessing)
    again = restored(preprocessing, tmp_path)
    assert isinstance(again, TextPreprocessing)
    short, long = again("a cat"), again("a very long text about a great many cats and dogs and birds")
    batch = again.collate([short, again("one dog runs")], [0, 1])
    assert isinstance(batch, dict)
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].sum(1).tolist() == [4, 5]
    assert batch["input_ids"][0, 4] == again.tokenizer.pad_token_id
    assert batch["labels"].tolist() == [0, 1]
    assert len(long["input_ids"]) == 8
    assert again.tokenizer.decode(short["input_ids"], skip_special_tokens=True) == "a cat"
    paired = again("a cat", "a dog")
    assert paired["token_type_ids"] == [0] * 4 + [1] * 3
    assert torch.isfinite(model(**batch).loss)


def test_max_length_is_bounded_by_the_positions_of_the_model(minilm):
    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(config)
    preprocessing = preprocessing_for(model, "transformers", minilm, "text", max_length=128)
    batch = preprocessing.collate([preprocessing("cats and dogs " * 50)], None)
    assert batch["input_ids"].shape == (1, 16)
    assert "labels" not in batch
    model(**batch)


def test_a_tokenizer_without_padding_gets_it(shared_data):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=512, n_positions=64)
    model = GPT2ForSequenceClassification(config)
    source = shared_data / "checkpoints" / "stories260k"
    preprocessing = preprocessing_for(model, "transformers", source, "text")
    batch = preprocessing.collate([preprocessing("Once upon a time"), preprocessing("A cat")], [0, 1])
    assert model.config.pad_token_id == preprocessing.tokenizer.pad_token_id
    assert torch.isfinite(model(**batch).loss)


def test_the_wrong_kind_of_data_is_named(minilm):
    resnet = timm.create_model("test_resnet")
    with pytest.raises(DataError, match="timm model takes images; the data set holds texts"):
        preprocessing_for(resnet, "timm", "test_resnet", "text")
    bert = BertForSequenceClassification(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(DataError, match="takes texts; the data set holds images"):
        preprocessing_for(bert, "transformers", minilm, "image")


def test_strict_fields(tmp_path):
    good = ImagePreprocessing().to_dict()
    cases = {
        "surprise is unknown": {**good, "surprise": 1},
        "mean is missing": {name: value for name, value in good.items() if name != "mean"},
        "type must be one of image, hub-image, text; found 'pickle'": {"type": "pickle"},
        "crop_pct must lie in": {**good, "crop_pct": float("nan")},
        "mean must hold 3 numbers": {**good, "mean": [0.5]},
        "std must hold 3 numbers": {**good, "std": [0.1, 0.1, 0]},
        "input_size must be": {**good, "input_size": [3, -1, 4]},
        "interpolation must be one of": {**good, "interpolation": "magic"},
        "must be an object": ["image"],
        "no usable image processor": {"type": "hub-image", "channels": 3},
    }
    for message, fields in cases.items():
        with pytest.raises(FormatError, match=message):
            preprocessing_from_dict(fields, tmp_path)
    with pytest.raises(ConfigError, match="max_length must be"):
        TextPreprocessing(None, 0)
    with pytest.raises(FormatError, match="no usable tokenizer"):
        preprocessing_from_dict({"type": "text", "max_length": 8, "pair": False}, tmp_path)
