"""transformers' own Trainer, with the KL in the loss."""

from __future__ import annotations

import copy
import inspect
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from processes import alone_and_together
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from bayesify import ELBO, BayesianModel, ConfigError, DataError, FineTuneConfig, Rank1Config, bayesify
from bayesify.config import NetworkConfig
from bayesify.finetune import make_optimizer
from bayesify.finetune.callback import KLCallback

N, T, WORDS = 24, 5, 30
SURE = 1e-6
"""A spread that leaves no noise, so that losses can be compared."""


def classifier(**options: Any) -> BayesianModel:
    torch.manual_seed(0)
    config: Any = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, vocab_size=WORDS,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,  # type: ignore[call-arg]
    )  # fmt: skip
    return bayesify(BertForSequenceClassification(config), members=2, **options)


def sentences() -> datasets.Dataset:
    """Sentences whose class is their first word's remainder by 3, with a column that no network takes."""
    torch.manual_seed(1)
    ids = torch.randint(3, WORDS, (N, T))
    columns = {"text": ["as it was"] * N, "input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()}
    return datasets.Dataset.from_dict(columns)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 8, "report_to": "none", "use_cpu": True, "logging_steps": 1,
        "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**usual, **options})


def sgd(bnn: BayesianModel, rate: float) -> Any:
    return torch.optim.SGD(bnn.parameters(), rate), None


def test_logged_loss_has_the_annealed_kl(tmp_path: Path) -> None:
    bnn = classifier(posterior_scale=SURE)
    args = arguments(tmp_path, max_steps=6, learning_rate=0.0, per_device_train_batch_size=N)
    trainer = Trainer(
        bnn, args, train_dataset=sentences(), callbacks=[KLCallback(annealing=0.5)], optimizers=sgd(bnn, 0.0)
    )
    trainer.train()
    batch = sentences().with_format("torch")[:]
    inputs = {name: batch[name] for name in ("input_ids", "labels")}
    nll, kl = bnn.train()(**inputs).loss.item(), bnn.kl().item()
    logged = [(row["loss"], row["kl"]) for row in trainer.state.log_history if "kl" in row]
    expected = [nll + min(1.0, (step + 1) / 3) * kl / N for step in range(6)]
    assert [loss for loss, _ in logged] == pytest.approx(expected, rel=1e-3)
    assert [value for _, value in logged] == pytest.approx([kl] * 6, rel=1e-5)
    assert bnn.kl_weight == 0.0
    elbo = ELBO(bnn, N)(bnn(**inputs), step=None)
    assert logged[-1][0] == pytest.approx(elbo.loss.item(), rel=1e-3)


def test_accumulated_batches_count_the_kl_once(tmp_path: Path) -> None:
    trained = []
    for size, accumulated in ((12, 1), (6, 2)):
        bnn = classifier(posterior_scale=SURE)
        args = arguments(
            tmp_path, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated
        )
        Trainer(
            bnn, args, train_dataset=sentences(), callbacks=[KLCallback(annealing=0)], optimizers=sgd(bnn, 0.05)
        ).train()
        trained.append(bnn.state_dict())
    start = classifier(posterior_scale=SURE).state_dict()
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-3, atol=2e-5, msg=name)
    assert any(not torch.equal(start[name], trained[0][name]) for name in start if "rank1" in name)


def train_and_save(folder: Path) -> None:
    """Two steps of 12 sentences, divided among the processes there are; the first one writes the result."""
    bnn = classifier(posterior_scale=SURE, init_scale=0.2)
    size = 12 // int(os.environ.get("WORLD_SIZE", "1"))
    args = arguments(folder, max_steps=2, per_device_train_batch_size=size)
    Trainer(
        bnn, args, train_dataset=sentences(), callbacks=[KLCallback(annealing=0)], optimizers=sgd(bnn, 0.05)
    ).train()
    if int(os.environ.get("RANK", "0")) == 0:
        save_file({name: value.clone() for name, value in bnn.state_dict().items()}, folder / "state.safetensors")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    folders = alone_and_together([train_and_save], tmp_path)["train_and_save"]
    expected, found = (load_file(folder / "state.safetensors") for folder in folders)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5, msg=name)


def test_trains_evaluates_and_keeps_the_best(tmp_path: Path) -> None:
    bnn = classifier()
    args = arguments(
        tmp_path, num_train_epochs=15, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True,
        save_total_limit=2, metric_for_best_model="eval_loss",
    )  # fmt: skip
    optimizer = make_optimizer(bnn, FineTuneConfig(learning_rate=3e-3))
    trainer = Trainer(
        bnn,
        args,
        train_dataset=sentences(),
        eval_dataset=sentences(),
        callbacks=[KLCallback(num_examples=10_000)],
        optimizers=(optimizer, None),  # type: ignore[arg-type]
        compute_metrics=lambda output: {"accuracy": (output.predictions.argmax(-1) == output.label_ids).mean()},  # type: ignore[arg-type]
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] / 2
    assert after["eval_accuracy"] > 0.9
    assert after["eval_loss"] == pytest.approx(trainer.state.best_metric)
    # Predictions are those of the mixture: log mean probabilities.
    found = torch.tensor(trainer.predict(sentences()).predictions)  # type: ignore[arg-type]
    expected = bnn.predict(input_ids=sentences().with_format("torch")[:]["input_ids"]).probs
    torch.testing.assert_close(found.exp(), expected, rtol=1e-4, atol=1e-5)


def language_model() -> BayesianModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=WORDS, n_positions=8, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return bayesify(GPT2LMHeadModel(config), members=2)


def test_resumed_run_of_a_tied_model_equals_an_unbroken_one(tmp_path: Path) -> None:
    data = sentences().map(lambda row: {"labels": row["input_ids"]})

    def train(folder: str, steps: int, resume: bool) -> BayesianModel:
        bnn = language_model()
        args = arguments(tmp_path / folder, max_steps=steps, save_strategy="steps", save_steps=3, learning_rate=1e-3,
                         lr_scheduler_type="constant")  # fmt: skip
        trainer = Trainer(bnn, args, train_dataset=data, callbacks=[KLCallback(annealing=0)])
        trainer.train(resume_from_checkpoint=resume or None)
        return bnn

    unbroken = train("a", 6, False)
    train("b", 3, False)
    resumed = train("b", 6, True)
    assert unbroken.lm_head.weight is unbroken.transformer.wte.weight
    assert resumed.lm_head.weight is resumed.transformer.wte.weight
    for name, value in unbroken.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


def test_the_kl_is_shared_by_all_tokens_of_an_example() -> None:
    bnn = language_model().train()
    ids = torch.randint(3, WORDS, (4, T))
    labels = ids.clone()
    labels[:2, :3] = -100
    bnn.kl_weight = 0.1
    torch.manual_seed(0)
    found = bnn(input_ids=ids, labels=labels).loss.item()
    bnn.kl_weight = 0.0
    torch.manual_seed(0)
    nll = bnn(input_ids=ids, labels=labels).loss.item()
    assert found - nll == pytest.approx(0.1 * bnn.kl().item() / ((4 * T - 6) / 4), rel=1e-3)


def test_options_stand_before_the_networks_own_config() -> None:
    bnn: Any = classifier(init_scale=0.2)
    assert isinstance(bnn.config, NetworkConfig)
    assert bnn.config == Rank1Config(members=2, init_scale=0.2) == bnn.config
    assert bnn.config != Rank1Config(members=3, init_scale=0.2)
    assert hash(bnn.config) == hash(Rank1Config(members=2, init_scale=0.2))
    assert bnn.config.num_labels == 3
    bnn.config.pad_token_id = 7
    assert bnn.model.config.pad_token_id == 7
    with pytest.raises(AttributeError):
        bnn.config.members = 5  # type: ignore[misc]
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = bnn.config.no_such_thing
    twin = copy.deepcopy(bnn)
    twin.config.pad_token_id = 8
    assert (bnn.config.pad_token_id, twin.model.config.pad_token_id) == (7, 8)
    assert not isinstance(bayesify(nn.Linear(3, 2), members=2).config, NetworkConfig)


def test_copy_of_a_model_in_a_trainer_calls_itself(tmp_path: Path) -> None:
    bnn = classifier()
    Trainer(bnn, arguments(tmp_path), train_dataset=sentences(), callbacks=[KLCallback()])
    assert "input_ids" in inspect.signature(bnn.forward).parameters
    twin = copy.deepcopy(bnn)
    with torch.no_grad():
        for parameter in bnn.parameters():
            parameter.zero_()
    ids = torch.randint(3, WORDS, (2, T))
    assert bnn.eval()(ids).logits.exp().allclose(torch.tensor(1 / 3))
    assert not twin.eval()(ids).logits.exp().allclose(torch.tensor(1 / 3))


@pytest.mark.parametrize(
    ("options", "callback", "error", "message"),
    [
        ({"weight_decay": 0.1}, {}, ConfigError, "pull the factors to zero"),
        ({"label_smoothing_factor": 0.1}, {}, DataError, "computed none"),
        ({}, {"num_examples": 0}, ConfigError, "number of training examples"),
    ],
)
def test_trainers_that_would_leave_the_kl_out(
    options: dict[str, Any], callback: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    args = arguments(tmp_path, max_steps=1, **options)
    trainer = Trainer(classifier(), args, train_dataset=sentences(), callbacks=[KLCallback(**callback)])
    with pytest.raises(error, match=message):
        trainer.train()


def test_data_without_length_need_a_number(tmp_path: Path) -> None:
    stream: Any = sentences().to_iterable_dataset()
    trainer = Trainer(classifier(), arguments(tmp_path, max_steps=1), train_dataset=stream, callbacks=[KLCallback()])
    with pytest.raises(ConfigError, match="num_examples"):
        trainer.train()


def test_plain_network_has_no_kl(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found BertForSequenceClassification"):
        Trainer(classifier().unload(), arguments(tmp_path), train_dataset=sentences(), callbacks=[KLCallback()])


def test_kl_is_not_added_twice() -> None:
    bnn = classifier().train()
    bnn.kl_weight = 0.1
    ids = torch.randint(3, WORDS, (2, T))
    output = bnn(ids, labels=torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="kl_weight"):
        ELBO(bnn, 10)(output)
    with pytest.raises(DataError, match="computed none"):
        bnn(ids)
    first, *_ = bnn(ids, labels=torch.tensor([0, 1]), return_dict=False)
    assert first.item() > 0.1 * bnn.kl().item()
