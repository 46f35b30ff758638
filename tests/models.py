"""The model table: every promise of the library is tested over these.

Random weights, made small; heads and layer scales that start at zero are replaced by random values, or they would
hide every error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from bayesify import BayesianModel, bayesify


@dataclass(frozen=True)
class Case:
    """A model, two or more examples for it, and where its output is."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any] | tuple[Any, ...]]
    tolerance: float = 1e-5
    merges: bool = True

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.build()
        revive(model)
        return model.eval()

    def example(self, seed: int = 1) -> tuple[tuple[Any, ...], dict[str, Any]]:
        torch.manual_seed(seed)
        inputs = self.inputs()
        return ((), inputs) if isinstance(inputs, dict) else (inputs, {})


@torch.no_grad()
def revive(model: nn.Module) -> None:
    """Give parameters that start constant (zero heads, tiny layer scales) values that let errors through."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.std(unbiased=False) == 0 or parameter.abs().max() < 1e-3):
            parameter.uniform_(0.5, 1.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]


def tensor(output: Any) -> Tensor:
    """The tensor to compare: logits, the last hidden state, or the output itself."""
    for name in ("logits", "last_hidden_state"):
        if hasattr(output, name):
            return getattr(output, name)
    return output[0] if isinstance(output, tuple) else output


class PlainCNN(nn.Module):
    """Groups, dilation, reflect padding, depth-wise and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=2, dilation=2, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, groups=4, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=3)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.grouped(self.stem(x).relu())).relu()
        x = self.up(self.depthwise(x)).relu()
        return self.head(x.mean((2, 3)))


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class PackedGRUClassifier(nn.Module):
    """Bidirectional, packed sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 7, bidirectional=True)
        self.head = nn.Linear(14, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, state = self.gru(packed)
        return self.head(state.transpose(0, 1).flatten(1))


class TorchEncoder(nn.Module):
    """torch.nn's encoder, whose fused kernels go past its layers, on padded sequences."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        kept = (~padding)[..., None]
        return self.head((self.encoder(x, src_key_padding_mask=padding) * kept).sum(1) / kept.sum(1))


class TorchTransformer(nn.Module):
    """torch.nn's encoder and decoder on [time, batch, channels], with attention to other widths beside."""

    main_input_name = "source"

    def __init__(self) -> None:
        super().__init__()
        encode = nn.TransformerEncoderLayer(16, 2, 24, activation="gelu", norm_first=True)
        decode = nn.TransformerDecoderLayer(16, 2, 24, norm_first=True)
        self.encoder = nn.TransformerEncoder(encode, 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decode, 2)
        self.pool = nn.MultiheadAttention(16, 2, kdim=16, vdim=12, add_bias_kv=True, add_zero_attn=True)
        self.value = nn.Linear(16, 12)
        self.head = nn.Linear(16, 3)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(len(target))
        x = self.decoder(target, self.encoder(source), tgt_mask=mask.to(source.dtype), tgt_is_causal=True)
        return self.head(self.pool(x[:1], x, self.value(x))[0][0])


def _timm(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=7, **kwargs)

    return build


def _mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=7, img_size=64, patch_size=16, num_blocks=2, embed_dim=64)


def _transformers(config: str, model: str, **kwargs: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        settings = getattr(transformers, config)(**kwargs)
        return getattr(transformers, model)(settings)

    return build


def _images(size: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(2, 3, size, size),)


def _text(**extra: int) -> Callable[[], dict[str, Tensor]]:
    def inputs() -> dict[str, Tensor]:
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[1, 5:] = 0
        decoder = {name: torch.randint(3, 50, (2, length)) for name, length in extra.items()}
        return {"input_ids": torch.randint(3, 50, (2, 7)), "attention_mask": mask, **decoder}

    return inputs


_WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}

CASES = [
    Case(
        "mlp",
        lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)),
        lambda: (torch.randn(4, 5),),
    ),
    Case("cnn", PlainCNN, _images(12)),
    Case("resnet18", _timm("resnet18"), _images(64)),
    Case("convnext_atto", _timm("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 24, 32, 48)), _images(64)),
    Case("test_efficientnet", _timm("test_efficientnet"), _images(64)),
    Case("vit_tiny", _timm("vit_tiny_patch16_224", img_size=64, depth=3), _images(64)),
    Case(
        "swin_tiny",
        _timm("swin_tiny_patch4_window7_224", img_size=112, depths=(2, 2), embed_dim=24, num_heads=(2, 4)),
        _images(112),
    ),
    Case("mixer", _mixer, _images(64)),
    Case("test_nfnet", _timm("test_nfnet"), _images(64), merges=False),
    Case(
        "bert",
        _transformers("BertConfig", "BertForSequenceClassification", num_labels=4, max_position_embeddings=16, **_WIDE),
        _text(),
    ),
    Case(
        "distilbert",
        _transformers(
            "DistilBertConfig",
            "DistilBertForSequenceClassification",
            num_labels=4,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            vocab_size=50,
            max_position_embeddings=16,
        ),
        _text(),
    ),
    Case(
        "gpt2",
        _transformers(
            "GPT2Config",
            "GPT2LMHeadModel",
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=50,
            n_positions=16,
            bos_token_id=1,
            eos_token_id=2,
        ),
        _text(),
    ),
    Case(
        "llama",
        _transformers("LlamaConfig", "LlamaForCausalLM", num_key_value_heads=2, max_position_embeddings=16, **_WIDE),
        _text(),
    ),
    Case(
        "t5",
        _transformers(
            "T5Config",
            "T5ForConditionalGeneration",
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            vocab_size=50,
            decoder_start_token_id=0,
        ),
        _text(decoder_input_ids=4),
    ),
    Case(
        "vit_hf",
        _transformers(
            "ViTConfig",
            "ViTForImageClassification",
            image_size=32,
            patch_size=8,
            num_labels=5,
            **{k: v for k, v in _WIDE.items() if k != "vocab_size"},
        ),
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
    ),
    Case(
        "wav2vec2",
        _transformers(
            "Wav2Vec2Config",
            "Wav2Vec2ForSequenceClassification",
            num_labels=4,
            conv_dim=(16, 16),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=4,
            classifier_proj_size=16,
            mask_time_prob=0.0,
            layerdrop=0.0,
            **_WIDE,
        ),
        lambda: {"input_values": torch.randn(2, 800)},
    ),
    Case(
        "torch_encoder",
        TorchEncoder,
        lambda: (torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]),
    ),
    Case("torch_transformer", TorchTransformer, lambda: (torch.randn(4, 8, 16), torch.randn(4, 4, 16))),
    Case("lstm", LSTMClassifier, lambda: (torch.randn(3, 6, 6),)),
    Case("packed_gru", PackedGRUClassifier, lambda: (torch.randn(3, 6, 6), torch.tensor([4, 6, 2]))),
]

BY_NAME = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def some_cases(*names: str) -> Any:
    return pytest.mark.parametrize("case", [BY_NAME[name] for name in names], ids=lambda case: case.name)


def convert(case: Case, **options: Any) -> BayesianModel:
    """A conversion whose members differ clearly from each other and from the base.

    It has had its first call, at which a network is looked at, with any test that wanted the same.
    """
    return copy.deepcopy(_called(case.name, tuple(sorted({"init_scale": 0.3, **options}.items()))))


@cache
def _called(name: str, options: tuple[tuple[str, Any], ...]) -> BayesianModel:
    case = BY_NAME[name]
    model = case.model()
    torch.manual_seed(7)
    bnn = bayesify(model, **dict(options))
    args, kwargs = case.example()
    bnn.predict(*args, **kwargs)
    return bnn
