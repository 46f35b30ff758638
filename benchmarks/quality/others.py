"""What others do: dropout, SWAG, Laplace, mean-field VI and LoRA, by the libraries that people use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from methods import DRAWS, MEMBERS, Predict, evaluation_of, outputs_of, plain, tuned
from tasks import Batches, Task, batches_of
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify import FineTuneConfig, FineTuner, Predictive
from bayesify.batch import split_batch
from bayesify.evaluation import collect
from bayesify.modes import start_training


class Drawn:
    """A network with a random forward as a mixture of S draws, as `collect` asks for; its modes are left alone."""

    members = 1

    def __init__(self, network: nn.Module, draw: Callable[[], Any] = lambda: None) -> None:
        self.network, self.draw = network, draw

    @torch.no_grad()
    def predict(self, *args: Any, samples: int, seed: int, member_chunk: None = None, **kwargs: Any) -> Predictive:
        outputs = []
        with torch.random.fork_rng(devices=[]):
            for number in range(samples):
                torch.manual_seed(1000 * seed + number)
                self.draw()
                output = self.network(*args, **kwargs)
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
    return lambda batches: outputs_of(model, batches, DRAWS)


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

    def features(batches: Batches, labeled: bool) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
        labels = collect(network, batches, progress=False, labeled=labeled)[1]
        handle.remove()
        return torch.cat(found), torch.zeros(0) if labels is None else labels

    fit = TensorDataset(*features(batches_of(evaluation_of(task.train)), labeled=True))
    posterior = Laplace(copy.deepcopy(head), "classification", subset_of_weights="all", hessian_structure="kron")
    posterior.fit(DataLoader(fit, batch_size=100))
    posterior.optimize_prior_precision(method="marglik")

    def predict(batches: Batches) -> Tensor:
        found = features(batches, labeled=False)[0]
        torch.manual_seed(0)
        probs = posterior.predictive_samples(found, pred_type="nn", n_samples=DRAWS)
        return probs.detach().clamp_min(1e-12).log()[None]

    return predict


def mean_field(task: Task, seed: int, delta: float = 0.05) -> Predict:
    """Every dense and convolutional weight normal around the pretrained one (MOPED), by bayesian-torch.

    Its LSTM takes no pretrained weights; there, all weights are normal, as in the workload of the paper.
    """
    network = task.network(seed)
    if any(isinstance(module, nn.LSTM) for module in network.modules()):
        return _mean_field_lstm(network, task, seed)
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    prior = {
        "prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -4.0,
        "type": "Reparameterization", "moped_enable": True, "moped_delta": delta,
    }  # fmt: skip
    _pad_outside(network)
    dnn_to_bnn(network, prior)
    for module in network.modules():
        if hasattr(module, "dnn_to_bnn_flag"):
            module.dnn_to_bnn_flag = True
    config = replace(task.tuning, seed=seed)
    _train(network, task, config, lambda: get_kl_loss(network))
    network.eval()
    model = Drawn(network)
    return lambda batches: outputs_of(model, batches, DRAWS)


def _pad_outside(network: nn.Module) -> None:
    """timm's convolutions that pad like TensorFlow become a padding and torch's own, which bayesian-torch knows."""
    from timm.layers import Conv2dSame

    for name, conv in list(network.named_modules()):
        if isinstance(conv, Conv2dSame):
            plain = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,  # type: ignore[arg-type]
                              dilation=conv.dilation, groups=conv.groups, bias=conv.bias is not None)  # type: ignore[arg-type]  # fmt: skip
            plain.load_state_dict(conv.state_dict())
            network.set_submodule(name, nn.Sequential(_SamePad(conv), plain))


class _SamePad(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.window = conv.kernel_size, conv.stride, conv.dilation

    def forward(self, x: Tensor) -> Tensor:
        from timm.layers import pad_same

        return pad_same(x, *self.window)  # type: ignore[arg-type]


def _mean_field_lstm(network: nn.Module, task: Task, seed: int) -> Predict:
    from mean_field import MeanField, train_mean_field

    model = MeanField(network, prior_scale=1.0, spread=0.02)
    config = replace(task.tuning, seed=seed, eval_samples=DRAWS)
    train_mean_field(model, task.train, batches_of(task.validation, 500), config)  # type: ignore[arg-type]
    return lambda batches: outputs_of(model, batches, DRAWS)


def _train(network: nn.Module, task: Task, config: FineTuneConfig, kl: Callable[[], Tensor]) -> None:
    """The loop of `FineTuner` with another KL, without selection of a state."""
    from bayesify.finetune.groups import make_optimizer, make_schedule

    torch.manual_seed(config.seed)
    steps = config.steps or 0
    optimizer = make_optimizer(network, config)
    schedule = make_schedule(optimizer, config, steps)
    start_training(network, freeze_batch_norm=config.freeze_batch_norm)
    for step, batch in zip(range(steps), _endless(task, config), strict=False):
        args, kwargs, labels = split_batch(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            output = network(*args, **kwargs)
        weight = min(1.0, (step + 1) / (config.kl_annealing * steps)) / len(task.train)  # type: ignore[arg-type]
        loss = F.cross_entropy(getattr(output, "logits", output).float(), labels) + weight * kl()
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
