"""Ends of texts, caches that go on, pipelines, and what is refused or put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import CASES
from torch import Tensor, nn
from writers import of_members, prompt, storyteller, writer, written

from bayesify import BayesifyError, DataError, bayesify


def _bayesian(name: str = "gpt2", **options: Any) -> Any:
    model = writer(name)
    return bayesify(model, **{"members": 3, "init_scale": 0.4, **options})


def _state(bnn: Any) -> dict[str, Any]:
    """Everything that a call of `generate` touches for a while."""
    modules = list(bnn.modules())
    return {
        "modes": [module.training for module in modules],
        "held": [getattr(module, "held", None) for module in modules],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
        "attributes": sorted(vars(bnn.model)),
        "config": bnn.model.generation_config.to_dict(),
    }


def test_doubt_ends_with_the_text() -> None:
    bnn = _bayesian()
    torch.manual_seed(0)
    found = bnn.generate(prompt(), do_sample=True, num_return_sequences=8, max_new_tokens=30, temperature=2.0)
    ended = 0
    for row, new in enumerate(found.sequences[:, 5:].tolist()):
        length = new.index(2) + 1 if 2 in new else len(new)
        ended += length < len(new)
        for doubt in (found.entropy[row], found.mutual_information[row]):
            assert doubt[:length].isfinite().all()
            assert doubt[length:].isnan().all()
    assert ended > 1


def test_doubt_ends_with_the_text_in_beam_search() -> None:
    bnn = _bayesian()
    found = bnn.generate(
        prompt(2), num_beams=4, num_return_sequences=4, max_new_tokens=20, eos_token_id=list(range(2, 16)),
        do_sample=True, temperature=3.0, return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(found.entropy.isnan(), found.beam_indices < 0)
    assert (found.beam_indices < 0).any()


def test_stop_strings(data_dir: Path) -> None:
    model, tokenizer = storyteller(data_dir)
    inputs = tokenizer(["Once upon a time", "Lily"], return_tensors="pt", padding=True)
    found = bayesify(model, members=2).generate(
        **inputs, stop_strings=["."], tokenizer=tokenizer, max_new_tokens=60, pad_token_id=tokenizer.pad_token_id
    )
    new = found.sequences[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(found.entropy.isnan(), new == tokenizer.pad_token_id)


def test_a_cache_goes_on() -> None:
    bnn = _bayesian(posterior_scale=0.5)
    draws = {"samples": 2, "seed": 3, "min_new_tokens": 4, "return_dict_in_generate": True}
    whole = bnn.generate(prompt(), max_new_tokens=8, **draws)
    half = bnn.generate(prompt(), max_new_tokens=4, **draws)
    rest = bnn.generate(half.sequences, past_key_values=half.past_key_values, max_new_tokens=4, **draws)
    assert torch.equal(rest.sequences, whole.sequences)
    torch.testing.assert_close(rest.entropy, whole.entropy[:, 4:], rtol=1e-4, atol=1e-4)
    own = transformers.DynamicCache()
    assert torch.equal(bnn.generate(prompt(), past_key_values=own, max_new_tokens=4, **draws).sequences, half.sequences)


def test_a_foreign_cache_is_refused() -> None:
    bnn = _bayesian()
    cache = bnn.model(prompt(), use_cache=True).past_key_values
    with pytest.raises(DataError, match=r"holds 1 rows; expected 3.*empty cache"):
        bnn.generate(torch.cat([prompt(), prompt()], 1), past_key_values=cache, max_new_tokens=2)


def test_generation_config_stays_as_it_was() -> None:
    bnn = _bayesian()
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=True, eos_token_id=2, pad_token_id=0)
    before = config.to_dict()
    assert list(bnn.generate(prompt(), config)) == ["sequences", "entropy", "mutual_information"]
    assert config.to_dict() == before
    config.return_dict_in_generate = True
    assert "past_key_values" in bnn.generate(prompt(), config)


class _Interrupts(transformers.LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > 6:
            raise KeyboardInterrupt
        return scores


class _Streams:
    def __init__(self, breaks_at: int) -> None:
        self.tokens: list[int] = []
        self.breaks_at = breaks_at

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()
        if len(self.tokens) > self.breaks_at:
            raise RuntimeError("the stream broke")

    def end(self) -> None: ...


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_all_is_put_back(name: str) -> None:
    bnn = _bayesian(name, posterior_scale=0.5)
    bnn.train()
    bnn.model.get_input_embeddings().eval()
    before = _state(bnn)
    bnn.generate(prompt(), max_new_tokens=3, samples=2)
    assert _state(bnn) == before
    with pytest.raises(KeyboardInterrupt):
        bnn.generate(
            prompt(), max_new_tokens=9, min_new_tokens=9, num_beams=2, logits_processor=[_Interrupts()], samples=2
        )
    assert _state(bnn) == before
    with pytest.raises(RuntimeError, match="the stream broke"):
        bnn.generate(prompt(), max_new_tokens=9, min_new_tokens=9, streamer=_Streams(7), samples=2)
    assert _state(bnn) == before


def test_streams() -> None:
    stream = _Streams(100)
    found = _bayesian().generate(prompt(), max_new_tokens=5, streamer=stream)
    assert stream.tokens == found.sequences[0].tolist()


def test_pipeline(data_dir: Path) -> None:
    model, tokenizer = storyteller(data_dir)
    bnn = bayesify(model, members=2)
    pipe = transformers.pipeline("text-generation", model=bnn, tokenizer=tokenizer)  # type: ignore[call-overload]
    (record,) = pipe("Once upon a time", max_new_tokens=4, do_sample=False)
    found = bnn.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=4)
    assert record["generated_text"].startswith("Once upon a time")
    assert record["entropy"] == pytest.approx(found.entropy[0].tolist(), abs=1e-5)
    assert len(record["mutual_information"]) == 4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "group beam search"),
        ({"custom_generate": "transformers-community/dola"}, "custom_generate"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"token_healing": True}, "token_healing"),
        ({"cache_implementation": "paged"}, "paged"),
        ({"cache_implementation": "static", "prefill_chunk_size": 2}, "prefill_chunk_size"),
        ({"encoder_outputs": (torch.zeros(1, 5, 16),)}, "encoder_outputs"),
        ({"samples": 0}, "samples must be at least 1"),
        (
            {"token_type_ids": torch.zeros(2, 5, dtype=torch.long)},
            r"token_type_ids has shape \(2, 5\); expected 1 rows",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], named: str) -> None:
    bnn = _bayesian()
    before = _state(bnn)
    with pytest.raises(DataError, match=named):
        bnn.generate(prompt(), max_new_tokens=3, **options)
    assert _state(bnn) == before


def test_layers_that_a_cached_step_goes_past() -> None:
    """A state over time, updated from the weight of a convolution that is not called."""
    bnn = _bayesian("recurrent_gemma")
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    with pytest.raises(DataError, match=r"conv_1d carries factors.*use_cache=False.*exclude="):
        bnn.generate(prompt(), **options)
    whole = bnn.generate(prompt(), use_cache=False, **options)
    text, entropy, _ = written(of_members(bnn), prompt(), 1)
    assert torch.equal(whole.sequences[:, :6], text)
    torch.testing.assert_close(whole.entropy[0, :1], entropy, rtol=1e-3, atol=1e-3)
    apart = _bayesian("recurrent_gemma", exclude=("*conv_1d",))
    cached, whole = (apart.generate(prompt(), use_cache=cache, **options) for cache in (True, False))
    torch.testing.assert_close(cached.entropy, whole.entropy, rtol=1e-3, atol=1e-3)


def test_prompts_tell_where_the_batch_is() -> None:
    """Layers that work on [time, batch, ...], of a model whose conversion could not see it."""
    torch.manual_seed(0)
    small: dict[str, Any] = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in (
        ("layers", 1), ("attention_heads", 2), ("ffn_dim", 20))}  # fmt: skip
    config = transformers.FSMTConfig(langs=["a", "b"], src_vocab_size=30, tgt_vocab_size=30, d_model=16, **small)
    bnn = bayesify(transformers.FSMTForConditionalGeneration(config).eval(), members=3, init_scale=0.5)
    options = {"max_new_tokens": 4, "use_cache": False}
    ids = torch.randint(3, 30, (2, 5))
    expected, dims = bnn.generate(ids, **options), dict(bnn.report.batch_dims)
    assert set(dims.values()) == {1}
    for _, layer in bnn.layers():
        for site in layer.rank1.values():
            site.batch_dim = 0  # type: ignore[assignment]
    bnn.report.batch_dims.clear()
    bnn.report.unsettled = True
    found = bnn.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert bnn.report.batch_dims == dims
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.entropy, expected.entropy)


def test_models_that_cannot_write() -> None:
    image = next(case for case in CASES if case.name == "vit_hf")
    with pytest.raises(BayesifyError, match="cannot generate text"):
        bayesify(image.model()).generate(prompt())
    with pytest.raises(BayesifyError, match="cannot generate text"):
        bayesify(nn.Sequential(nn.Linear(4, 4))).generate(prompt())
    bnn = _bayesian()
    bnn.unload()
    with pytest.raises(BayesifyError, match="unloaded"):
        bnn.generate(prompt())


def test_a_generate_of_the_models_own() -> None:
    class Own(transformers.GPT2LMHeadModel):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return super().generate(*args, **kwargs)

    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20, bos_token_id=1, eos_token_id=2)
    with pytest.raises(BayesifyError, match="`generate` of its own"):
        bayesify(Own(config)).generate(prompt())
