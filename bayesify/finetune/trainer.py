"""The fine-tuner: one readable loop on Accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from bayesify.batch import Rows, split_batch
from bayesify.data.seeding import seeded
from bayesify.errors import ConfigError, DataError, FormatError, TrainingError
from bayesify.finetune.batches import RankBatches, endless
from bayesify.finetune.checkpoint import (
    has_checkpoint,
    load_checkpoint,
    load_trained_state,
    random_state,
    save_checkpoint,
    set_random_state,
    trained_state,
)
from bayesify.finetune.checks import check_halves, check_map_style, check_partition, check_plain
from bayesify.finetune.config import FineTuneConfig
from bayesify.finetune.groups import make_optimizer, make_schedule, select_trained
from bayesify.finetune.log import TrainingLog
from bayesify.finetune.losses import for_own_loss, nan_in, own_loss, plain_nll
from bayesify.model import BayesianModel
from bayesify.modes import start_training
from bayesify.objective import ELBO, ELBOTerms
from bayesify.predictive import Predictive
from bayesify.tasks import TASKS, TaskName, task_of

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class FineTuneResult:
    """What a run came to: rows of the log, the best validation NLL (nats) and the step that had it."""

    history: list[dict[str, Any]]
    steps: int
    best_nll: float | None
    best_step: int | None


class FineTuner:
    """Fine-tune a `BayesianModel` (or, as a baseline under the same loop, a plain network).

    Args:
        model: trained in place; after `fit` it holds the state with the best validation NLL.
        train: map-style data set of (inputs, label) pairs or of mappings with "labels". Its `set_epoch` is called
            if it has one.
        validation: data set for the selection of the best state; without it the last state stays.
        config: the options.
        output: folder for `log.jsonl` and the checkpoint; `None` keeps everything in memory.
        collate_fn: makes a batch of examples; by default torch's, or the data set's own `collate_fn`.
        task: what the outputs of a plain network mean; by default what its config says, or classes. A Bayesian model
            has a task of its own.
        progress: whether to show a progress bar.

    Runs on one CPU or GPU as it is, and on several under ``accelerate launch``: the global batch is split among the
    processes, gradients are averaged, and the KL, equal on all of them, is counted once.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Dataset[Any],
        validation: Dataset[Any] | None = None,
        config: FineTuneConfig | None = None,
        *,
        output: str | Path | None = None,
        collate_fn: Collate | None = None,
        task: TaskName | None = None,
        progress: bool = True,
    ) -> None:
        if config is not None and not isinstance(config, FineTuneConfig):
            raise ConfigError(f"config must be a FineTuneConfig; found {type(config).__name__}.")
        for data in (train, validation):
            if data is not None:
                check_map_style(data)
        if task is not None and isinstance(model, BayesianModel):
            raise ConfigError("task= is for plain networks; that of a Bayesian model is given where it is converted.")
        if task is not None and task not in TASKS:
            raise ConfigError(f"task={task!r} is unknown; expected one of {', '.join(map(repr, TASKS))}.")
        self.model = model
        self.task: TaskName | None = task
        self.config = config or FineTuneConfig()
        self.train = train
        self.validation = validation
        self.output = None if output is None else Path(output)
        self.collate_fn = collate_fn or getattr(train, "collate_fn", None) or default_collate
        self.progress = progress
        if validation is not None and len(validation) == 0:  # type: ignore[arg-type]
            raise DataError("the validation data set is empty; leave it out to train without one.")
        self.accelerator = _accelerator(self.config, self.output)
        self.batches = RankBatches(
            len(train),  # type: ignore[arg-type]
            self.config.batch_size,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            seed=self.config.seed,
        )
        check_plain(model, self.config)
        check_partition(model, self.config, self.batches)
        per_epoch = max(1, math.ceil(len(self.batches) / self.config.accumulation))
        self.total_steps = self.config.steps or self.config.epochs * per_epoch
        self.eval_every = self.config.eval_every or per_epoch

    # ---------------------------------------------------------------------------------------------- the loop

    def fit(self, resume: bool = False) -> FineTuneResult:
        """Train; with `resume`, go on from the checkpoint in the output folder, with the numbers of an unbroken run.

        Raises:
            TrainingError: the loss is not finite; the step is named, and the last checkpoint is kept.
            FormatError: `resume` without a checkpoint that belongs to this model and these options.
        """
        learned = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        try:
            return self._fit(resume)
        finally:
            for parameter, flag in learned.items():
                parameter.requires_grad_(flag)

    def _fit(self, resume: bool) -> FineTuneResult:
        config, accelerator = self.config, self.accelerator
        self.model.to(accelerator.device)
        self._settle()
        set_seed(config.seed, device_specific=True)
        select_trained(self.model, config)
        check_halves(self.model)
        bayesian = isinstance(self.model, BayesianModel)
        optimizer = make_optimizer(self.model, config)
        progress: dict[str, Any] = {"step": 0, "best_nll": None, "best_step": None}
        best: dict[str, Tensor] = {}
        scheduler = make_schedule(optimizer, config, self.total_steps)
        if resume:
            progress, best = self._restore(optimizer)
            scheduler.load_state_dict(progress["scheduler"])
        self._check_agreed(progress["step"])
        model, optimizer = accelerator.prepare(self.model, optimizer)
        objective = self._objective()
        loader: DataLoader[Any] = DataLoader(
            self.train,
            batch_sampler=self.batches,
            collate_fn=self.collate_fn,
            num_workers=config.workers,
            generator=torch.Generator().manual_seed(config.seed),  # or each iterator would move the global stream on
        )
        batches = endless(loader, self.batches, self.train, progress["step"] * config.accumulation)
        if config.trackers:
            accelerator.init_trackers("bayesify", config={k: str(v) for k, v in config.to_dict().items()})
        path = None if self.output is None else self.output / "log.jsonl"
        if path is not None and accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        try:
            if bayesian:
                self.model.expansion = config.expand  # type: ignore[assignment]
                self.model.temperature, self.model.conformal = 1.0, None  # type: ignore[assignment]
                # One that the interrupted loop of another trainer left; here the objective adds the KL.
                self.model.kl_weight = 0.0  # type: ignore[assignment]
            with TrainingLog(accelerator, path, progress["step"], self.total_steps, self.progress) as log:
                for step in range(progress["step"], self.total_steps):
                    start_training(model, freeze_batch_norm=config.freeze_batch_norm)
                    terms = self._step(model, optimizer, objective, batches, step)
                    scheduler.step()
                    done = step + 1
                    log.advance(f"NLL {terms['nll']:.4f}")
                    if done % config.log_every == 0 or done == self.total_steps:
                        rates = {g["name"]: g["lr"] for g in optimizer.param_groups}
                        seconds = round(time.perf_counter() - started, 3)
                        log.write({"step": done, **terms, "learning_rate": rates, "seconds": seconds})
                    if done % self.eval_every == 0 or done == self.total_steps:
                        if self.validation is not None:
                            scores = self.validate()
                            log.write({"step": done, **scores})
                            nll, least = scores["validation_nll"], progress["best_nll"]
                            if math.isfinite(nll) and (least is None or nll < least):
                                progress.update(best_nll=nll, best_step=done)
                                best = {n: t.detach().cpu().clone() for n, t in trained_state(self.model).items()}
                        progress.update(step=done, scheduler=_plain(scheduler.state_dict()))
                        self._save(optimizer, progress, best)
                if best:
                    load_trained_state(self.model, best, "the best state")
                return FineTuneResult(log.rows, self.total_steps, progress["best_nll"], progress["best_step"])
        finally:
            accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            if config.trackers:
                for tracker in accelerator.trackers:  # end_training() would end the process group, too
                    tracker.finish()
            accelerator.free_memory()  # or the next fit would have two optimizers
            if bayesian:
                self.model.expansion = "replicate"  # type: ignore[assignment]
            self.model.eval()

    def _settle(self) -> None:
        """Let the model see where the batch is before anything counts its parameters: it may lose some."""
        if isinstance(self.model, BayesianModel) and self.model.report.unsettled:
            pair = [list(range(min(2, self.batches.length)))]
            with seeded("settle"):
                batch = next(iter(DataLoader(self.train, batch_sampler=pair, collate_fn=self.collate_fn)))
            args, kwargs, labels = split_batch(send_to_device(batch, self.accelerator.device))
            self.model.settled(lambda: None, args, for_own_loss(self._network, kwargs, labels) or kwargs)

    def _step(self, model: nn.Module, optimizer: Any, objective: Any, batches: Any, step: int) -> dict[str, float]:
        """One optimizer step: `accumulation` batches, `train_samples` draws of each; the means of its numbers."""
        config, accelerator = self.config, self.accelerator
        totals: dict[str, float] = {"loss": 0.0, "nll": 0.0, "kl": 0.0, "kl_weight": 0.0}
        forwards = config.accumulation * config.train_samples
        args, kwargs, labels, own, values = (), {}, None, None, 1.0
        for number in range(forwards):
            if number % config.train_samples == 0:
                args, kwargs, labels = split_batch(send_to_device(next(batches), accelerator.device))
                own = for_own_loss(self._network, kwargs, labels)
                if own is not None and isinstance(self.model, BayesianModel):
                    values = Rows(self._network).values_per_example(args, own)
            if labels is None and own is None:
                raise DataError("a training batch has no labels; expected (inputs, labels) or a mapping with 'labels'.")
            last = number == forwards - 1
            with nullcontext() if last else accelerator.no_sync(model):
                output = model(*args, **(kwargs if own is None else own))
                terms: ELBOTerms = objective(output, labels if own is None else None, step, values=values)
                means = accelerator.reduce(torch.stack([terms.loss.detach(), terms.nll.detach()]), "mean")
                loss, nll = means.tolist()  # type: ignore[union-attr]
                if not math.isfinite(loss):
                    numbers = f"nll {nll:.4g}, kl {terms.kl.item():.4g}"
                    raise self._diverged(optimizer, step, f"loss is {loss}", numbers, nan_in((args, kwargs, labels)))
                shared = _zero(model) if last and accelerator.num_processes > 1 else 0.0
                accelerator.backward(terms.loss / forwards + shared)
            parts = {"loss": loss, "nll": nll, "kl": terms.kl.item(), "kl_weight": terms.weight}
            totals = {name: totals[name] + value / forwards for name, value in parts.items()}
        limit = math.inf if config.clip_norm is None else config.clip_norm
        norm = accelerator.clip_grad_norm_(model.parameters(), limit)
        totals["gradient_norm"] = float(norm) if norm is not None else math.nan
        if not math.isfinite(totals["gradient_norm"]) and accelerator.scaler is None:  # a scaler skips such steps
            raise self._diverged(optimizer, step, "gradient is not finite", f"loss {totals['loss']:.4g}")
        optimizer.step()
        optimizer.zero_grad()
        return totals

    def _diverged(self, optimizer: Any, step: int, what: str, numbers: str, nan: str | None = None) -> TrainingError:
        """The error, with weights as they are after the step before."""
        optimizer.zero_grad()
        is_kept = self.checkpoint is not None and has_checkpoint(self.checkpoint)
        kept = f" The last checkpoint, in {self.output}, is kept." if is_kept else ""
        advice = "Try a lower learning_rate or factor_lr_multiplier." if nan is None else f"Its batch {nan}"
        return TrainingError(f"the {what} at step {step + 1} ({numbers}). {advice}{kept}")

    # ---------------------------------------------------------------------------------------------- validation

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """NLL (nats) and accuracy of the predictive on the validation data, over all processes."""
        if self.validation is None:
            raise DataError("there is no validation data.")
        accelerator, config = self.accelerator, self.config
        self.model.to(accelerator.device)
        share = range(accelerator.process_index, len(self.validation), accelerator.num_processes)  # type: ignore[arg-type]
        size = max(1, config.batch_size // accelerator.num_processes)
        groups = [list(share[start : start + size]) for start in range(0, len(share), size)]
        loader: DataLoader[Any] = DataLoader(
            self.validation,
            batch_sampler=groups,
            collate_fn=getattr(self.validation, "collate_fn", None) or self.collate_fn,
            num_workers=config.workers,
            generator=torch.Generator().manual_seed(config.seed),
        )
        # Sums of NLL and right answers, and the counts they are divided by.
        precise = torch.float32 if accelerator.device.type == "mps" else torch.float64  # Apple's has no more
        totals = torch.zeros(4, dtype=precise, device=accelerator.device)
        for number, batch in enumerate(loader):
            args, kwargs, labels = split_batch(send_to_device(batch, accelerator.device))
            with accelerator.autocast():
                totals += torch.tensor(self._scores(args, kwargs, labels, config.seed + number), device=totals.device)
        nll, count, right, answers = accelerator.reduce(totals, "sum").tolist()  # type: ignore[union-attr]
        return {"validation_nll": nll / count, **({"validation_accuracy": right / answers} if answers else {})}

    def _scores(self, args: Any, kwargs: Any, labels: Tensor | None, seed: int) -> list[float]:
        """NLL summed over a batch, its count, right answers, and theirs (0 where there are no classes)."""
        if (nan := nan_in((args, kwargs, labels))) is not None:
            raise DataError(f"a validation batch {nan}")
        own = for_own_loss(self._network, kwargs, labels)
        if own is not None:
            self.model.eval()
            count = Rows(self._network).batch_size(args, kwargs)
            return [float(own_loss(self.model(*args, **own))) * count, count, 0.0, 0.0]
        if labels is None:
            raise DataError("a validation batch has no labels.")
        predictive = self._predict(args, kwargs, seed).fitted(labels)
        count = float(TASKS[predictive.task].count(labels))
        nll = -float(predictive.log_prob(labels).sum())
        if predictive.task != "classification":
            return [nll, count, 0.0, 0.0]
        right = (predictive.probs.argmax(-1) == (labels.argmax(-1) if labels.is_floating_point() else labels)).sum()
        return [nll, count, float(right), count]

    @property
    def _network(self) -> nn.Module:
        return self.model.model if isinstance(self.model, BayesianModel) else self.model

    @property
    def _plain_task(self) -> TaskName:
        """What a plain network is trained for: classes, unless somebody says other."""
        return self.task or task_of(self.model) or "classification"

    def _predict(self, args: Any, kwargs: Any, seed: int) -> Predictive:
        if isinstance(self.model, BayesianModel):
            return self.model.predict(*args, **kwargs, samples=self.config.eval_samples, seed=seed)
        self.model.eval()
        outputs = Rows(self.model).outputs(self.model(*args, **kwargs))
        return Predictive.of(outputs[None, None], self._plain_task)

    # ---------------------------------------------------------------------------------------------- parts

    def _objective(self) -> Callable[..., ELBOTerms]:
        if not isinstance(self.model, BayesianModel):
            return plain_nll(self.model, self._plain_task)
        annealing = round(self.config.kl_annealing * self.total_steps)
        return ELBO(
            self.model,
            len(self.train),  # type: ignore[arg-type]
            annealing_steps=annealing,
            likelihood=self.config.likelihood,
            kl_temperature=self.config.kl_temperature,
        )

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the last checkpoint."""
        return None if self.output is None else self.output / "checkpoint"

    def _save(self, optimizer: Any, progress: dict[str, Any], best: dict[str, Tensor]) -> None:
        if self.checkpoint is None:
            return
        states = self.accelerator.gather_for_metrics([random_state()], use_gather_object=True)
        scaler = self.accelerator.scaler
        progress = {**progress, "random": states, "scaler": None if scaler is None else _plain(scaler.state_dict())}
        progress["run"] = self._run()
        if self.accelerator.is_main_process:
            save_checkpoint(self.checkpoint, self.model, optimizer, progress, best)
        self.accelerator.wait_for_everyone()

    def _check_agreed(self, step: int) -> None:
        """Machines without a common file system may not all have the checkpoint."""
        steps = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device)).tolist()  # type: ignore[union-attr]
        if len(set(steps)) > 1:
            raise FormatError(
                f"the processes would go on from different steps ({steps}): they need one output folder that all "
                "machines see, or a copy of it on each."
            )

    def _run(self) -> dict[str, Any]:
        """What a resumed run must have in common with the interrupted one."""
        free = ("workers", "log_every", "trackers")
        options = {name: value for name, value in self.config.to_dict().items() if name not in free}
        rank1 = self.model.config.non_defaults() if isinstance(self.model, BayesianModel) else None
        counts = {"examples": len(self.train), "processes": self.accelerator.num_processes}  # type: ignore[arg-type]
        return {**options, "rank1": rank1, **counts}

    def _restore(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.checkpoint is None:
            raise FormatError("resume=True needs the output folder of the run to resume.")
        progress, best = load_checkpoint(self.checkpoint, self.model, optimizer, self._run())
        set_random_state(progress["random"][self.accelerator.process_index])
        if self.accelerator.scaler is not None and progress["scaler"]:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        return progress, best


def _accelerator(config: FineTuneConfig, output: Path | None) -> Accelerator:
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.precision:
        AcceleratorState._reset_state(reset_partial_state=False)  # the state is global, the precision is not
    return Accelerator(
        mixed_precision=config.precision,
        log_with=list(config.trackers) or None,
        project_dir=None if output is None else str(output),
    )


def _zero(model: nn.Module) -> Tensor:
    """Zero, with a gradient for every parameter that trains: processes wait for all, used in the forward or not."""
    firsts = [p.flatten()[0].float() for p in model.parameters() if p.requires_grad and p.numel()]
    return 0.0 * torch.stack(firsts).sum()


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """The part of a state dict that JSON keeps."""
    kinds = (int, float, bool, str, list, type(None))
    return {name: value for name, value in state.items() if isinstance(value, kinds)}
