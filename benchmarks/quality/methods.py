"""The methods: a task and a seed to outputs [K, S, N, C] of every set; steps, batches and schedule are the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from tasks import Batches, Task, batches_of
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify import BayesianModel, FineTuneConfig, FineTuner, Predictive, bayesify
from bayesify.batch import split_batch
from bayesify.evaluation import collect

Predict = Callable[[Batches], Tensor]
"""Batches to outputs [K, S, N, C]."""
MEMBERS = 4
DRAWS = 8
"""Of MC dropout, SWAG, Laplace and mean-field VI: twice the cost of four members."""


def outputs_of(model: Any, batches: Batches, samples: int | None = None) -> Tensor:
    return collect(model, batches, samples=samples, progress=False, labeled=False)[0].outputs


def tuned(task: Task, seed: int, model: nn.Module, **options: Any) -> nn.Module:
    """The model, fine-tuned as the task says, at the state with the best validation NLL."""
    config = replace(task.tuning, seed=seed, **options)
    FineTuner(model, task.train, task.validation, config, progress=False).fit()
    return model


def plain(task: Task, seed: int, **options: Any) -> nn.Module:
    return tuned(task, seed, task.network(seed), **options)


def deterministic(task: Task, seed: int, tuning: dict[str, Any] | None = None) -> Predict:
    model = plain(task, seed, **(tuning or {}))
    return lambda batches: outputs_of(model, batches)


def untouched(task: Task, seed: int) -> Predict:
    model = task.network(seed)
    return lambda batches: outputs_of(model, batches)


def rank1(
    task: Task, seed: int, tuning: dict[str, Any] | None = None, samples: int | None = None, **options: Any
) -> Predict:
    """Ours; without options, as shipped."""
    network = task.network(seed)
    torch.manual_seed(seed)
    model = bayesify(network, members=options.pop("members", MEMBERS), **options)
    tuned(task, seed, model, **(tuning or {}))
    return lambda batches: outputs_of(model, batches, samples)


def batch_ensemble(task: Task, seed: int) -> Predict:
    """Four members with factors that have no spread."""
    return rank1(task, seed, posterior="deterministic")


def spread(task: Task, seed: int, method: str = "fisher", **options: Any) -> Predict:
    """No training: the spread of one member's factors, from the training data."""
    model: BayesianModel = bayesify(task.network(seed), members=1, init="ones", noise="member")
    data = copy.copy(task.train)
    if hasattr(data, "training"):
        data.training = False  # type: ignore[attr-defined]
    model.fit_spread(batches_of(data), method, seed=seed, **options)  # type: ignore[arg-type]
    return lambda batches: outputs_of(model, batches, DRAWS)


# ------------------------------------------------------------------------------------------------ others


class Drawn(nn.Module):
    """A network with a random forward as a mixture of S draws, as `collect` asks for."""

    members = 1

    def __init__(self, network: nn.Module, draw: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.network, self.draw = network, draw

    @torch.no_grad()
    def predict(self, *args: Any, samples: int | None = None, seed: int | None = 0, **kwargs: Any) -> Predictive:
        outputs = []
        with torch.random.fork_rng(devices=[]):
            for number in range(samples or 1):
                torch.manual_seed(1000 * (seed or 0) + number)
                self.draw()
                output = self.network(*args, **{k: v for k, v in kwargs.items() if k != "labels"})
                outputs.append(getattr(output, "logits", output))
        return Predictive(torch.stack(outputs)[None])


def mc_dropout(task: Task, seed: int, rate: float = 0.1) -> Predict:
    """Dropout on the inputs of the task's modules, or a network's own, in training and prediction."""
    network = task.network(seed)
    for name in task.dropout:
        network.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs: (F.dropout(inputs[0], rate, module.training), *inputs[1:])
        )
    tuned(task, seed, network)
    for name, module in network.named_modules():
        if isinstance(module, nn.Dropout):
            module.train()
        elif name in task.dropout:
            module.training = True  # of this module alone, for its hook; a linear or a sequence has no other use of it
    model = Drawn(network)

    def predict(batches: Batches) -> Tensor:
        return outputs_of(_AsIs(model), batches, DRAWS)

    return predict


class _AsIs:
    """A model whose modes an evaluation leaves alone."""

    members = 1

    def __init__(self, model: Drawn) -> None:
        self.predict = model.predict


def swag(task: Task, seed: int) -> Predict:
    """SWAG-diagonal: three quarters of the steps as usual, then moments of the weights at a constant learning rate."""
    steps = task.tuning.steps or 0
    network = plain(task, seed, steps=round(0.75 * steps))
    trained = [p for p in network.parameters() if p.requires_grad]
    sums, squares, count = [torch.zeros_like(p) for p in trained], [torch.zeros_like(p) for p in trained], 0
    rate = task.tuning.learning_rate / 4
    for part in range(10):
        config = replace(
            task.tuning, steps=max(1, round(0.025 * steps)), schedule="constant", warmup=0.0, learning_rate=rate,
            seed=1000 * seed + part,
        )  # fmt: skip
        FineTuner(network, task.train, None, config, progress=False).fit()
        count += 1
        for total, square, weight in zip(sums, squares, trained, strict=True):
            total += weight.detach()
            square += weight.detach().square()
    means = [total / count for total in sums]
    scales = [(square / count - mean.square()).clamp_min(0).sqrt() for square, mean in zip(squares, means, strict=True)]

    def draw() -> None:
        for weight, mean, scale in zip(trained, means, scales, strict=True):
            weight.copy_(mean + scale * torch.randn_like(mean) / 2**0.5)

    network.eval()
    model = Drawn(network, draw)
    return lambda batches: outputs_of(model, batches, DRAWS)


def laplace(task: Task, seed: int) -> Predict:
    """Last-layer Laplace by laplace-torch: Kronecker factors, prior by marginal likelihood, draws of the last layer."""
    from laplace import Laplace
    from torch.utils.data import DataLoader, TensorDataset

    network = plain(task, seed)
    head = network.get_submodule(task.head)

    def features(batches: Batches) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
        labels = collect(network, batches, progress=False)[1]
        handle.remove()
        return torch.cat(found), torch.zeros(0) if labels is None else labels

    data = copy.copy(task.train)
    if hasattr(data, "training"):
        data.training = False  # type: ignore[attr-defined]
    fit = TensorDataset(*features(batches_of(data)))
    posterior = Laplace(copy.deepcopy(head), "classification", subset_of_weights="all", hessian_structure="kron")
    posterior.fit(DataLoader(fit, batch_size=100))
    posterior.optimize_prior_precision(method="marglik")

    def predict(batches: Batches) -> Tensor:
        found = features(batches)[0]
        torch.manual_seed(0)
        probs = posterior.predictive_samples(found, pred_type="nn", n_samples=DRAWS)
        return probs.detach().clamp_min(1e-12).log()[None]

    return predict


def mean_field(task: Task, seed: int, delta: float = 0.05) -> Predict:
    """Every dense, convolutional and recurrent weight normal around the pretrained one (MOPED), by bayesian-torch."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    network = task.network(seed)
    prior = {
        "prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -4.0,
        "type": "Reparameterization", "moped_enable": True, "moped_delta": delta,
    }  # fmt: skip
    dnn_to_bnn(network, prior)
    for module in network.modules():
        if hasattr(module, "dnn_to_bnn_flag"):
            module.dnn_to_bnn_flag = True
    config = replace(task.tuning, seed=seed)
    _train(network, task, config, lambda: get_kl_loss(network))
    network.eval()
    model = Drawn(network)
    return lambda batches: outputs_of(model, batches, DRAWS)


def _train(network: nn.Module, task: Task, config: FineTuneConfig, kl: Callable[[], Tensor]) -> None:
    """The loop of `FineTuner` with another KL, without selection of a state."""
    from bayesify.finetune.groups import make_optimizer, make_schedule

    torch.manual_seed(config.seed)
    steps = config.steps or 0
    optimizer = make_optimizer(network, config)
    schedule = make_schedule(optimizer, config, steps)
    network.train()
    for step, batch in zip(range(steps), _endless(task, config), strict=False):
        args, kwargs, labels = split_batch(batch)
        output = network(*args, **kwargs)
        weight = min(1.0, (step + 1) / (config.kl_annealing * steps)) / len(task.train)  # type: ignore[arg-type]
        loss = F.cross_entropy(getattr(output, "logits", output), labels) + weight * kl()
        optimizer.zero_grad()
        loss.backward()
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimizer.step()
        schedule.step()


def _endless(task: Task, config: FineTuneConfig) -> Iterator[Any]:
    order = torch.Generator().manual_seed(config.seed)
    data: Any = task.train
    epoch = 0
    while True:
        if hasattr(data, "set_epoch"):
            data.set_epoch(epoch)
        for rows in torch.randperm(len(data), generator=order).split(config.batch_size)[:-1]:
            rows = rows.tolist()
            collate = getattr(data, "collate_fn", None) or torch.utils.data.default_collate
            yield collate(data.__getitems__(rows) if hasattr(data, "__getitems__") else [data[row] for row in rows])
        epoch += 1


def lora(task: Task, seed: int) -> Predict:
    """Four LoRA fine-tunes of rank 8 with a head each, by peft."""
    from peft import LoraConfig, get_peft_model

    models = []
    for own in range(MEMBERS * seed, MEMBERS * (seed + 1)):
        network = task.network(own)
        config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1,
                            target_modules=["query", "key", "value", "dense"])  # fmt: skip
        adapted = get_peft_model(network, config)
        models.append(tuned(task, own, adapted, learning_rate=4 * task.tuning.learning_rate))
    return lambda batches: torch.cat([outputs_of(model, batches) for model in models])


METHODS: dict[str, Callable[..., Predict]] = {
    "deterministic": deterministic,
    "untouched": untouched,
    "rank1": rank1,
    "batchensemble": batch_ensemble,
    "spread": spread,
    "mc-dropout": mc_dropout,
    "swag": swag,
    "laplace": laplace,
    "mean-field": mean_field,
    "lora": lora,
}
