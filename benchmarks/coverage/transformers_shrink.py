"""Make any transformers configuration tiny by what its fields are called.

No table of four hundred configurations: a field named `…_layers` is a depth, one named `…_intermediate_size` a width.
Two ways to shrink widths exist, because no name says how they hang together: all to the same few values, or all
divided by the same number. What neither can know is in `transformers_overrides`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedConfig


class Level(NamedTuple):
    """How much is made small; what fails at one level may run at the next."""

    widths: Literal["same", "scaled", "kept"] = "same"
    depths: bool = True
    images: bool = True


LEVELS = (
    Level(),
    Level("scaled"),
    Level("scaled", depths=False),
    Level("scaled", images=False),
    Level("scaled", depths=False, images=False),
    Level("kept"),
)

VOCABULARY = 128
TEXT_IDS = (40, 96)
"""Tokens of examples: above the usual special tokens, below those that `_special_ids` moves."""
_SCALE = 8
_HEAD = 16
_POSITIONS = 256
_QUERIES = 10

_DEPTH = re.compile(
    r"^(num_layers|n_layers?|layers|depth|num_blocks|num_(encoder|decoder|hidden)_layers|[lxr]_layers)$"
    r"|_(num_hidden_layers|num_layers|layers|depth)$|^num_\w+_layers$"
)
_NOT_DEPTH = re.compile(r"kv_shared|feat_extract|nextn|dense_layers|conv|extra|^head_depth|_query_|shared_layers")
_DEPTHS = re.compile(
    r"depths?$|blocks_per_stage|stage_num_blocks|num_blocks|block_sizes|numb_of_layers|repeats$|^layers$"
)
_HEADS = re.compile(r"(num_|n_|_)(attention_)?heads?$|^attention_heads$|attention_heads$|^n_heads?$|^num_heads$")
_KV_HEADS = re.compile(r"(num_|n_)(key_value|kv)_(attention_)?heads$|key_value_heads$|kv_heads$")
_HEAD_DIM = re.compile(r"head_dim$|mamba\w*(d_head|headdim)$|^d_kv$|^d_head$|head_size$|^dim_head$|attention_head_dim$")
_HALF_HEAD_DIM = re.compile(r"qk_(rope|nope)_head_dim$|^rotary_dim$|rope_head_dim$")
_INNER = re.compile(
    r"intermediate_(size|dim)$|ffn_(dim|hidden_size)$|^d_ff$|mlp_dim$|^n_inner$|feedforward$|^d_inner$|"
    r"feed_forward_hidden_size$|ffn_hidden$"
)
_WIDTH = re.compile(
    r"hidden_(size|dim)\w*$|^d_model$|^n_embd$|embed(ding)?_(dim|size)$|embed_dims$|_dim$|^dim$|emb_(dim|size)$|^width$|"
    r"(proj|projection|output|pooler)_(size|dim)\w*$|channels$|lora_rank$|lru_width|hidden_sizes$|conv_dim|pos_feats$|"
    r"^neck_|_rank$|filters$|embeds_dims?$|_width$|hidden_size\w*$|out_hidden|channel_list$|^conv_dim$|dim_per_stage$|"
    r"pooler_output_size$|upsample_groups$|(coordinate|shape)_size$|d_state$|state_size$|_units?$|input_size$|_in_channels|feature_sizes$|features$"
)
_NOT_WIDTH = re.compile(
    r"num_channels|^in_chan|^in_channels$|mel|input_channels|audio_channels|^(input|output)_size$|feature_size$|"
    r"backbone_feature_sizes|codebook|type_|class_embed|stem_num_channels|num_features|input_feat|context|per_layer_input|"
    r"^channels$|query_dim|time_features|max_\w+_dim|patch_embed_input|_input_channels|visual_pos_dim|output_num_channels|"
    r"num_pos|true_dim|subsampling_conv_channels|^input_dim$|projection_input_dim|mult|spectrogram|target_dim|keypoint_decoder_dim|out_channels_\w|num_\w*channels"
)
_VOCABULARY = re.compile(r"vocab_size$|^num_embeddings$|vocab_size_per_layer_input|^(\w+_)?vocab_sizes?$")
_NOT_VOCABULARY = re.compile(r"type_vocab|char_vocab|pronunciation|shape_vocab|composer|codebook|audio_vocab|speakers")
_SPECIAL_ID = re.compile(r"(token|bos|eos|pad|cls|sep|mask|unk|start|end)\w*_(id|index)$|_(token_id|token_index)$")
_EXPERTS = re.compile(r"^(num|n|moe_num)_(routed_|local_)?experts$|^n_routed_experts$|^moe_num_experts$|^num_experts$")
_TOP_K = re.compile(r"^num_experts_per_tok(en)?$|^moe_(top_?)?k$|^top_k_experts$|^num_selected_experts$|^router_top_k$")
_POSITION = re.compile(r"max_position_embeddings$|^n_(positions|ctx)$|max_(source|target)_positions$|^max_seq_len$")
_QUERY = re.compile(r"^num_(object_)?queries$|num_(query|detection)_tokens$|num_denoising$|n(um)?_latents$")
_IMAGE = re.compile(
    r"^(\w*_)?image_size$|^img_size$|image_embedding_size$|backbone_feature_sizes$|image_grid_pinpoints$|feat_sizes$|"
    r"^crop_size$|rope_k_sizes$|^input_resolution$|low_res_mask_size$|^resolution$|pretrain_image_size"
)
_LAYER_INDEX = re.compile(r"(indexes|indices|index|_ids?|_idx|layers|blocks|levels)$")


@dataclass
class _Context:
    """What all parts of a configuration share, so that their sizes still fit together."""

    level: Level
    image_divisor: int = 1
    list_divisor: int = _SCALE
    special_ids: dict[int, int] = field(default_factory=dict)


def shrink(config: PreTrainedConfig, level: Level) -> PreTrainedConfig:
    """A tiny configuration of the same class."""
    images = _image_divisor(config) if level.images else 1
    context = _Context(level, images, _list_divisor(config), _special_ids(config))
    return _shrink(config, context)


def parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The configurations within a configuration, by field."""
    return {name: value for name, value in values_of(config).items() if isinstance(value, PreTrainedConfig)}


def values_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration, parts included."""
    read = config._getattr_without_heterogeneous_validation  # getattr() refuses what differs between layers
    values = {f.name: read(f.name, None) for f in fields(config)}  # type: ignore[arg-type]
    if hasattr(config, "out_indices"):  # a property, and an argument, of backbones
        values = {n: v for n, v in values.items() if n not in ("out_features", "_out_features", "_out_indices")}
        values["out_indices"] = config.out_indices
    return values


def _shrink(config: PreTrainedConfig, context: _Context) -> PreTrainedConfig:
    values = values_of(config)
    for name in ("id2label", "label2id", "dtype", "transformers_version"):
        values.pop(name, None)
    whole = {name: _shrink(part, context) for name, part in parts(config).items()}
    plain = {name: value for name, value in values.items() if name not in whole}
    if config.is_heterogeneous:
        layers = {int(i): layer for i, layer in config.to_dict()["per_layer_config"].items()}
        plain["per_layer_config"] = [layers.get(i, {}) for i in range(plain["num_hidden_layers"])]
    small = {**plain, **_values(plain, context)}
    if config.is_heterogeneous:
        widths = context.level.widths
        small["per_layer_config"] = {
            i: {n: _or(_value(n, v, layer, context, widths), v) for n, v in layer.items()}
            for i, layer in enumerate(small["per_layer_config"])
        }
    labels = {"num_labels": 5} if config.num_labels == 2 else {}
    return type(config)(**{**small, **whole, **labels})


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _values(values: dict[str, Any], context: _Context) -> dict[str, Any]:
    """The fields that change."""
    staged = any(isinstance(v, (list, tuple)) and _DEPTHS.search(n) and len(v) > 1 for n, v in values.items())
    widths = "scaled" if staged and context.level.widths == "same" else context.level.widths
    small = _depths(values) if context.level.depths else {}
    for name, value in values.items():
        if name not in small:
            new = _value(name, value, values, context, widths)
            if new is not None:
                small[name] = new
    return small


def _value(name: str, value: Any, values: dict[str, Any], context: _Context, widths: str) -> Any:
    """The small value of one field; `None` leaves it as it is."""
    if value is None:
        return _HEAD if name == "head_dim" and widths == "same" else _MISSING.get(name)
    if isinstance(value, (bool, str)):
        return None
    if isinstance(value, dict):
        return _rope(value, widths) if "rope" in name else None
    if _IMAGE.search(name):
        return _map(value, lambda v: max(v // context.image_divisor, 1))
    if _SPECIAL_ID.search(name):
        return _map(value, lambda v: context.special_ids.get(v, v))
    for pattern, limit in _LIMITS:
        if pattern.search(name):
            return _map(value, lambda v, limit=limit: min(v, limit))
    if _VOCABULARY.search(name) and not _NOT_VOCABULARY.search(name):
        return _map(value, lambda v: min(v, VOCABULARY))
    if isinstance(value, (list, tuple)):
        if _DEPTHS.search(name) and context.level.depths:
            return _map(value, lambda v: min(v, 2))
        return _divided(value, context.list_divisor) if _is_width(name) and widths != "kept" else None
    return _width(name, value, values, widths == "same") if isinstance(value, int) and widths != "kept" else None


_MISSING = {
    **{f"{kind}_token_id": VOCABULARY - 1 - i for i, kind in enumerate(("image", "video", "audio"))},
    **{f"{kind}_token_index": VOCABULARY - 1 - i for i, kind in enumerate(("image", "video", "audio"))},
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": VOCABULARY,
}
"""Values for what a configuration leaves open although its model does not."""

_LIMITS = (
    (_EXPERTS, 4),
    (_TOP_K, 2),
    (_POSITION, _POSITIONS),
    (_QUERY, _QUERIES),
    (re.compile(r"^(n_group|num_expert_group)$"), 2),
    (re.compile(r"^(topk_group|num_nextn_predict_layers|mtp_num_layers)$"), 1),
    (re.compile(r"^attention_window$"), 8),
    (re.compile(r"chunk_size$"), 32),
)


def _width(name: str, value: int, values: dict[str, Any], same: bool) -> int | None:
    if not same:
        heads = _HEADS.search(name) or _KV_HEADS.search(name)
        scaled = not heads and (_is_width(name) or _INNER.search(name) or _HEAD_DIM.search(name))
        return _scaled(value) if scaled else None
    if _KV_HEADS.search(name):
        heads = next((v for n, v in values.items() if _HEADS.search(n) and isinstance(v, int)), value)
        return 4 if value == heads else min(value, 2)
    for pattern, width in _SAME:
        if pattern.search(name):
            return min(value, width)
    return min(value, 64) if _is_width(name) else None


_SAME = (
    (_HALF_HEAD_DIM, 8),
    (re.compile(r"(mamba|ssm)\w*heads$"), 8),
    (_HEAD_DIM, _HEAD),
    (_HEADS, 4),
    (_INNER, 96),
    (re.compile(r"lora_rank$"), 32),
    (re.compile(r"d_state$|state_size$"), 16),
)


def _is_width(name: str) -> bool:
    return bool(_WIDTH.search(name)) and not _NOT_WIDTH.search(name)


def _scaled(value: int) -> int:
    """An eighth, or as much of it as leaves a whole number of at least 8."""
    divisor = _SCALE
    while divisor > 1 and (value % divisor or value // divisor < 8):
        divisor //= 2
    return value // divisor


def _divided(value: Any, divisor: int) -> Any:
    return _map(value, lambda v: v // divisor if v % divisor == 0 else v)


def _list_divisor(config: PreTrainedConfig) -> int:
    """All widths of stages by the same number, as they are multiples of each other."""
    widths: list[int] = []
    for name, value in _walk(config):
        if isinstance(value, (list, tuple)) and _is_width(name):
            _map(value, lambda v: widths.append(v) or v)
    return min((v // _scaled(v) for v in widths if v > 4), default=1)


def _map(value: Any, function: Callable[[int], int]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, function) for item in value)
    return function(value) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else value


def _rope(value: dict[str, Any], widths: str) -> dict[str, Any]:
    """Sections are parts of half a head: 64 of them by default, 8 in a head of 16."""
    small = {name: _rope(entry, widths) if isinstance(entry, dict) else entry for name, entry in value.items()}
    for name, entry in value.items():
        if name.endswith("section") and isinstance(entry, (list, tuple)) and widths != "kept":
            divisor = max(sum(entry) // 8, 1) if widths == "same" else _SCALE
            parts_of_head = [max(item // divisor, 1) for item in entry]
            parts_of_head[0] += sum(entry) // divisor - sum(parts_of_head)
            small[name] = parts_of_head
    if widths == "same" and "rope_theta" in value and "mrope_section" not in value:  # its default is for the full size
        half = int(_HEAD * float(value.get("partial_rotary_factor") or 1.0)) // 2
        small["mrope_section"] = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    return small


# ------------------------------------------------------------------------------------------------ depth


def _depths(values: dict[str, Any]) -> dict[str, Any]:
    """Two layers, or as many as it takes to keep one of every kind and a place for every index of a layer."""
    names = [n for n, v in values.items() if _DEPTH.search(n) and not _NOT_DEPTH.search(n) and isinstance(v, int)]
    small: dict[str, Any] = {name: min(values[name], 2) for name in names}
    main = next((n for n in ("num_hidden_layers", "depth", "n_layer", "num_layers", "layers") if n in names), None)
    for name in ("num_kv_shared_layers", "num_extra_kv_shared_layers"):
        if isinstance(values.get(name), int):
            small[name] = 0
    for name in ("first_k_dense_replace", "num_dense_layers"):
        if isinstance(values.get(name), int):
            small[name] = min(values[name], 1)
    if main is None or values[main] <= 2:
        return small
    return {**small, **_layers(values, main)}


def _layers(values: dict[str, Any], main: str) -> dict[str, Any]:
    before = values[main]
    lists = {n: v for n, v in values.items() if isinstance(v, (list, tuple))}
    each = {n: v for n, v in lists.items() if len(v) == before and not _LAYER_INDEX.fullmatch(n)}
    indices = {n: v for n, v in lists.items() if n not in each and _LAYER_INDEX.search(n) and _are_indices(v, before)}
    kinds = [str([v[i] for v in each.values()]) for i in range(before)]
    kept = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    size = max(2, min(len(kept), 8), *(len(v) for v in indices.values()), 0)
    kept = sorted((kept + [i for i in range(before) if i not in kept])[:size])
    small: dict[str, Any] = {main: size}
    for name, value in each.items():
        small[name] = type(value)(value[i] for i in kept)
    for name, value in indices.items():
        last = size if name == "out_indices" or before in value else size - 1
        small[name] = type(value)(range(last - len(value) + 1, last + 1))
    return small


def _are_indices(value: Any, layers: int) -> bool:
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    return bool(value) and whole and all(0 <= v <= layers for v in value) and list(value) == sorted(set(value))


# ------------------------------------------------------------------------------------------------ shared


def _walk(config: PreTrainedConfig) -> list[tuple[str, Any]]:
    return list(values_of(config).items()) + [item for part in parts(config).values() for item in _walk(part)]


def _image_divisor(config: PreTrainedConfig) -> int:
    """From the largest image to four patches a side, by a power of two."""
    items = _walk(config)
    sizes = [max(v) if isinstance(v, (list, tuple)) else v for n, v in items if n in ("image_size", "img_size") and v]
    patches = [v for n, v in items if n == "patch_size" and isinstance(v, int)]
    if not sizes:
        return 1
    least = max(4 * max(patches, default=16), 56)
    divisor = 1
    while max(sizes) // (2 * divisor) >= least:
        divisor *= 2
    return divisor


def _special_ids(config: PreTrainedConfig) -> dict[int, int]:
    """Ids that no longer fit move to the end of the small vocabulary, each to its own place."""
    ids: set[int] = set()
    for name, value in _walk(config):
        if _SPECIAL_ID.search(name):
            _map(value, lambda v: ids.add(v) or v)
    large = sorted(i for i in ids if i >= TEXT_IDS[0])
    return {old: TEXT_IDS[1] + rank % (VOCABULARY - TEXT_IDS[1]) for rank, old in enumerate(large)}
