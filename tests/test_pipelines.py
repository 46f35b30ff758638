"""transformers' pipelines over a Bayesian model give what the average of its members' probabilities says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from bayesify import BayesianModel, bayesify

K = 3
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "mat", "on", "sat", "the", "where"]
SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20,
}  # fmt: skip
BERT: dict[str, Any] = {**SMALL, "vocab_size": len(WORDS), "max_position_embeddings": 40}


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # type: ignore[assignment]
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **names)


def converted(model: Any) -> BayesianModel:
    return bayesify(model.eval(), members=K, init_scale=0.5)


def bert(head: str, **options: Any) -> BayesianModel:
    torch.manual_seed(0)
    return converted(getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**BERT, **options)))


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def mean_probs(bnn: BayesianModel, dim: int = -1, **inputs: Any) -> Tensor:
    """[B, ...] from the members' merged networks."""
    with torch.no_grad():
        return torch.stack([bnn.merge(k)(**inputs).logits.softmax(dim) for k in range(K)]).mean(0)


def test_text_classification() -> None:
    bnn, words = bert("SequenceClassification", id2label={0: "no", 1: "yes", 2: "perhaps"}), tokenizer()
    texts = ["the cat sat", "the dog sat on the mat"]
    pipe = transformers.pipeline("text-classification", model=bnn, tokenizer=words)  # type: ignore[call-overload]
    for size in (1, 2):
        for text, found in zip(texts, pipe(texts, top_k=None, batch_size=size), strict=True):
            probs = mean_probs(bnn, **words(text, return_tensors="pt"))[0].tolist()
            expected = dict(zip(("no", "yes", "perhaps"), probs, strict=True))
            assert {row["label"]: row["score"] for row in found} == pytest.approx(expected, abs=1e-5)


def test_token_classification() -> None:
    bnn, words = bert("TokenClassification"), tokenizer()
    found = transformers.pipeline("token-classification", model=bnn, tokenizer=words)("the cat sat")  # type: ignore[call-overload]
    probs = mean_probs(bnn, **words("the cat sat", return_tensors="pt"))[0, 1:-1]
    assert [row["word"] for row in found] == ["the", "cat", "sat"]
    assert [row["score"] for row in found] == pytest.approx(probs.max(-1).values.tolist(), abs=1e-5)


def test_fill_mask() -> None:
    bnn, words = bert("MaskedLM"), tokenizer()
    pipe = transformers.pipeline("fill-mask", model=bnn, tokenizer=words)  # type: ignore[call-overload]
    found = pipe("the [MASK] sat", top_k=3)
    score, token = mean_probs(bnn, **words("the [MASK] sat", return_tensors="pt"))[0, 2].topk(3)
    assert [row["token"] for row in found] == token.tolist()
    assert [row["score"] for row in found] == pytest.approx(score.tolist(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_text_generation(batch_size: int) -> None:
    torch.manual_seed(0)
    words = tokenizer()
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=len(WORDS), n_positions=40, bos_token_id=2, eos_token_id=3,
        pad_token_id=0,
    )  # fmt: skip
    bnn = converted(transformers.GPT2LMHeadModel(config))
    words.padding_side = "left"
    pipe = transformers.pipeline("text-generation", model=bnn, tokenizer=words)  # type: ignore[call-overload]
    texts = ["the cat", "the dog sat on"]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    found = pipe(texts, batch_size=batch_size, return_full_text=True, **options)
    for text, (row,) in zip(texts, found, strict=True):
        ids = words(text, return_tensors="pt")
        alone = bnn.generate(**ids, **options)
        assert alone.entropy is not None
        assert row["generated_text"].split() == words.decode(alone["sequences"][0], skip_special_tokens=True).split()
        entropy = [value for value in row["entropy"] if value == value]
        assert entropy == pytest.approx(alone.entropy[0, : len(entropy)].tolist(), abs=1e-5)


def test_image_classification() -> None:
    torch.manual_seed(0)
    bnn = converted(
        transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=32, patch_size=8))
    )
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    found = transformers.pipeline("image-classification", model=bnn, image_processor=processor)(picture())  # type: ignore[call-overload]
    probs = mean_probs(bnn, **processor(picture(), return_tensors="pt"))[0]
    assert {row["label"]: row["score"] for row in found} == pytest.approx(
        {f"LABEL_{number}": p for number, p in enumerate(probs.tolist())}, abs=1e-5
    )


def test_audio_classification() -> None:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        **SMALL, vocab_size=20, conv_dim=[8, 8], conv_stride=[5, 2], conv_kernel=[10, 3], num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,  # type: ignore[call-arg]
    )  # fmt: skip
    bnn = converted(transformers.Wav2Vec2ForSequenceClassification(config))
    extractor = transformers.Wav2Vec2FeatureExtractor()
    sound = np.random.default_rng(0).standard_normal(1600).astype("float32")
    found = transformers.pipeline("audio-classification", model=bnn, feature_extractor=extractor)(sound)  # type: ignore[call-overload]
    inputs = extractor(sound, sampling_rate=16000, return_tensors="pt")
    probs = mean_probs(bnn, input_values=inputs["input_values"])[0]
    assert {row["label"]: row["score"] for row in found} == pytest.approx(
        {f"LABEL_{number}": p for number, p in enumerate(probs.tolist())}, abs=1e-5
    )


def test_image_segmentation() -> None:
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16, num_attention_heads=[1, 1, 2, 2],
        num_labels=3,  # type: ignore[call-arg]
    )  # fmt: skip
    bnn = converted(transformers.SegformerForSemanticSegmentation(config))
    processor = transformers.SegformerImageProcessor(size={"height": 32, "width": 32})
    found = transformers.pipeline("image-segmentation", model=bnn, image_processor=processor)(picture())  # type: ignore[call-overload]
    logits = mean_probs(bnn, 1, **processor(picture(), return_tensors="pt")).log()
    resized = torch.nn.functional.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
    classes = resized[0].argmax(0).numpy()
    masks = {row["label"]: np.asarray(row["mask"]) > 0 for row in found}
    assert masks.keys() == {f"LABEL_{number}" for number in np.unique(classes)}
    for label, mask in masks.items():
        assert (mask == (classes == int(label.removeprefix("LABEL_")))).mean() > 0.99


def test_objects_of_every_member() -> None:
    """Boxes have no mean: postprocessing gives those of each member, image by image."""
    torch.manual_seed(0)
    config = transformers.YolosConfig(**SMALL, image_size=[32, 32], num_detection_tokens=4)
    bnn = converted(transformers.YolosForObjectDetection(config))
    processor: Any = transformers.YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 32})
    inputs = processor([picture(), picture().rotate(90)], return_tensors="pt")
    sizes = [(32, 32)] * 2
    with torch.no_grad():
        found = processor.post_process_object_detection(bnn(**inputs), threshold=0.0, target_sizes=sizes * K)
        alone = [
            one
            for k in range(K)
            for one in processor.post_process_object_detection(bnn.merge(k)(**inputs), 0.0, target_sizes=sizes)
        ]
    for one, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(one["boxes"], expected["boxes"], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(one["scores"], expected["scores"], atol=1e-5, rtol=1e-4)
