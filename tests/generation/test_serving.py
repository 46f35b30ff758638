"""What people do with a language model around `generate`: scores, threads, saves, changes of the network."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from writers import writer

from bayesify import BayesifyError, bayesify, evaluate, from_pretrained
from bayesify.calibration.fisher import example_gradients


def _texts(rows: int = 3, tokens: int = 8) -> Tensor:
    return torch.randint(3, 40, (rows, tokens), generator=torch.Generator().manual_seed(1))


def _next_token_nll(logits: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_labels_of_a_causal_model_are_those_of_the_next_token(name: str) -> None:
    ids = _texts()
    labels = ids.clone()
    labels[1, 5:] = -100
    network = writer(name)
    with torch.no_grad():
        expected = _next_token_nll(network(ids).logits, labels)
    plain = evaluate(network, [{"input_ids": ids, "labels": labels}], progress=False, name="plain")
    assert plain.metrics["plain"]["nll"] == pytest.approx(expected, abs=1e-4)
    bnn = bayesify(network, members=3, init_scale=0.3).eval()
    with torch.no_grad():
        mixed = _next_token_nll(bnn(input_ids=ids).logits, labels)
    found = evaluate(bnn, [{"input_ids": ids, "labels": labels}], progress=False).metrics["bayesian"]["nll"]
    assert found == pytest.approx(mixed, abs=1e-4)
    # Labels beside the inputs, not among them, are taken as they are.
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    assert evaluate(bnn, [(ids, shifted)], progress=False).metrics["bayesian"]["nll"] == pytest.approx(mixed, abs=1e-4)


def test_labels_of_an_encoder_with_a_decoder_are_not_shifted() -> None:
    ids, labels = _texts(), _texts(tokens=5)
    bnn = bayesify(writer("t5"), members=2, init_scale=0.3).eval()
    starts = F.pad(labels[:, :-1], (1, 0), value=0)
    logits = bnn(input_ids=ids, decoder_input_ids=starts).logits.detach()
    batch = {"input_ids": ids, "decoder_input_ids": starts, "labels": labels}
    found = evaluate(bnn, [batch], progress=False).metrics["bayesian"]["nll"]
    assert found == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), labels.flatten())), abs=1e-4)


def test_threads() -> None:
    """Draws are in force in one thread at a time."""
    bnn = bayesify(writer("mistral"), members=4, init_scale=0.3).eval()
    prompts = [_texts(rows) for rows in (1, 2, 3, 4)] * 3

    def both(prompt: Tensor) -> tuple[Tensor, Tensor]:
        return bnn.predict(input_ids=prompt).probs, bnn.generate(prompt, max_new_tokens=3, do_sample=False).sequences  # type: ignore[return-value]

    expected = [both(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(both, prompts), expected, strict=True):
            torch.testing.assert_close(found[0], right[0])
            assert torch.equal(found[1], right[1])


@pytest.mark.parametrize("full", [False, True])
def test_how_a_model_generates_is_saved_with_it(full: bool, tmp_path: Path) -> None:
    network = writer("gpt2")
    network.save_pretrained(tmp_path / "base")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    bnn = bayesify(network, members=2, init_scale=0.3).eval()
    bnn.generation_config = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=[38, 39], pad_token_id=0)
    bnn.save_pretrained(tmp_path / "saved", full=full)
    again: Any = from_pretrained(tmp_path / "saved")
    assert again.generation_config.eos_token_id == [38, 39]
    assert {p.dtype for p in again.model.parameters()} == {p.dtype for p in network.parameters()}
    found, expected = (model.generate(_texts(), do_sample=False).sequences for model in (again, bnn))
    assert found.shape[1] <= 8 + 3
    assert torch.equal(found, expected)


def test_what_would_bypass_the_members_is_refused(tmp_path: Path) -> None:
    bnn = bayesify(writer("gpt2"), members=2)
    with pytest.raises(BayesifyError, match="generate_batch"):
        bnn.generate_batch([[1, 2]])
    with pytest.raises(BayesifyError, match="before the conversion"):
        bnn.resize_token_embeddings(50)
    bnn.model.transformer.h[0].mlp.c_fc = torch.nn.Linear(16, 64)  # type: ignore[union-attr, index]
    with pytest.raises(BayesifyError, match=r"c_fc has lost its factors"):
        bnn.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_task_that_the_network_learns_from_its_labels() -> None:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    bnn = bayesify(transformers.BertForSequenceClassification(config), members=2)
    assert bnn.task == "classification"
    bnn.train()(input_ids=_texts(), labels=torch.eye(3))
    assert bnn.task == "multilabel"
    predictive = bnn.predict(input_ids=_texts())
    torch.testing.assert_close(predictive.probs, predictive.outputs.sigmoid().mean((0, 1)))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_of_peft_do_not_hide_the_task() -> None:
    import peft

    adapted = peft.get_peft_model(writer("mistral"), peft.LoraConfig(target_modules=["q_proj"]))
    assert bayesify(adapted, members=2).task == "classification"


def test_padding_does_not_count_in_the_spread() -> None:
    ids, mask = _texts(2), torch.ones(2, 8, dtype=torch.long)
    mask[1] = 0
    bnn = bayesify(writer("mistral"), members=2, init="ones")
    found = {}
    for name, batch in {"masked": {"input_ids": ids, "attention_mask": mask}, "all": {"input_ids": ids}}.items():
        _, gradients = next(example_gradients(bnn, [batch], range(1), seed=0))
        found[name] = [float(torch.cat([g[row] for g in gradients]).norm()) for row in (0, 1)]
    assert found["masked"][0] == pytest.approx(found["all"][0], rel=1e-4)
    assert found["masked"][1] == 0.0 < found["all"][1]
