"""`BayesianModel`: a pretrained network as a distribution over networks that share one copy of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from bayesify.added import Added
from bayesify.batch import Rows, add_to_loss
from bayesify.config import NetworkConfig, Rank1Config
from bayesify.distributions import Factor, kl_divergence
from bayesify.errors import BayesifyError, DataError
from bayesify.graph import ConversionReport, restore, site_name
from bayesify.layers import Rank1Layer
from bayesify.merge import merged
from bayesify.modes import Lock, evaluating
from bayesify.passes import Passes, around, outside
from bayesify.predictive import Predictive
from bayesify.tasks import TaskName, resolve_task, task_of

if TYPE_CHECKING:
    from bayesify.calibration import Conformal, SpreadFit
    from bayesify.data import Preprocessing
    from bayesify.fused import FusedModel
    from bayesify.generation import Generation
    from bayesify.hub import Origin

Expansion = Literal["replicate", "partition"]
T = TypeVar("T")


class BayesianModel(nn.Module):
    """A converted network. Made by `bayesify(model)`.

    * `train()`: a call gives K·B rows, member-major, in the network's own output type. Labels given to a
      transformers model are expanded too, so its loss is the mean over members.
    * `eval()`: a call gives B rows, the predictive at the posterior means. Logits are the log of the mean probability.
    * `predict(...)` gives a `Predictive` with every member and sample.

    Any other attribute is the wrapped network's.

    Attributes:
        model: the rewritten network, still an instance of its class. Called by itself, outside of this class, it
            computes with the average of the members' factors.
        config: the options of the conversion; what else a transformers network's own config has is there, too.
        report: what was converted and what was not.
        passes: how the network is called: draws, what members share, how many at once.
        task: how outputs are read, `bayesify.tasks`: "classification", "segmentation" (classes in dimension 1),
            "multilabel", "regression" (outputs are averaged), "gaussian" (means and log variances), "members" (no
            mixture is defined, as of sets of objects: a call gives K·B rows in eval mode, too), or None (decided by
            the output's shape).
        kl_weight: T · κ(t) / N; in training, that times KL / V (see `ELBO`) is added to a loss that the network
            computes itself. For loops that are not ours, see `bayesify.finetune.callback`; `ELBO` adds the KL itself.
        expansion: in training, "replicate" shows every example to every member; "partition" gives each member
            B/K of the rows, in order, without repeating anything.
        temperature: what all members' logits are divided by in eval mode and in `predict`, see `fit_temperature`; 1
            changes nothing. Training does not see it, and `FineTuner` sets it back to 1.
        conformal: the calibration that `Predictive.sets` needs, see `fit_sets`.
        origin, label_names, preprocessing: where the network came from, its classes and how its inputs are made;
            kept for `save_pretrained`.
    """

    origin: Origin | None
    preprocessing: Preprocessing | None
    conformal: Conformal | None
    accepts_loss_kwargs = False
    """For transformers' Trainer: a loss is a mean over the batch, to be divided by the number of accumulated ones."""

    def __init__(
        self, model: nn.Module, config: Rank1Config, report: ConversionReport, task: TaskName | None = None
    ) -> None:
        super().__init__()
        self.model = model
        own = getattr(model, "config", None)
        self.config = NetworkConfig.over(config, own) if hasattr(own, "model_type") else config
        self.report = report
        self.passes = Passes(model, self.config, report)
        self.given_task: TaskName | None = task
        self.alone = Lock()
        self.expansion: Expansion = "replicate"
        self.kl_weight = 0.0
        self.temperature = 1.0
        self.conformal = None
        self.origin = None
        self.label_names: list[str] = []
        self.preprocessing = None

    # -------------------------------------------------------------------------------------------- structure

    @property
    def task(self) -> TaskName | None:
        """What the outputs mean: as given, or as the network's config says now."""
        given: TaskName | None = self.given_task
        return task_of(self.model) if given is None else given

    @task.setter
    def task(self, task: TaskName | None) -> None:
        self.given_task = task

    @property
    def members(self) -> int:
        """K, the number of members."""
        return self.config.members

    def layers(self) -> Iterator[tuple[str, Rank1Layer]]:
        """The converted layers with their names."""
        for name, module in self.model.named_modules():
            if isinstance(module, Rank1Layer):
                yield name, module

    def factors(self) -> Iterator[tuple[str, Literal["s", "r"], Factor]]:
        """(site name, "s" | "r", factor) of every factor; `factor.loc` and `factor.scale` are [K, d]."""
        for name, layer in self.layers():
            for weight, site in layer.rank1.items():
                for side in ("s", "r"):
                    factor = getattr(site, side)
                    if factor is not None:
                        yield site_name(name, weight), side, factor

    def slow_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the network, parameter) of everything that the conversion did not add."""
        added = {id(p) for m in self.model.modules() if isinstance(m, Added) for p in m.parameters()}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in added:
                yield name, parameter

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Protocols such as __deepcopy__ are this object's own business.
            if name.startswith("__") or "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)

    # -------------------------------------------------------------------------------------------- calling

    def train(self, mode: bool = True) -> BayesianModel:
        if not mode:
            self.passes.parting.end()  # of a training pass, whose backward may have needed it
        return super().train(mode)

    @around
    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """The network's own call; see the class for what comes back."""
        if labels is not None:  # named in the signature because transformers' Trainer looks for labels there
            kwargs["labels"] = labels
        if not self.training:
            mixture = partial(self.passes.mixture, args, kwargs, self.task, self.temperature)
            return self.settled(mixture, args, kwargs)
        partition = self.expansion == "partition"
        output = self.settled(partial(self.passes.train, args, kwargs, partition), args, kwargs)
        return self._with_kl(output, args, kwargs) if self.kl_weight else output

    @outside
    def _with_kl(self, output: Any, args: Any, kwargs: Any) -> Any:
        values = Rows(self.model).values_per_example(args, kwargs)
        return add_to_loss(output, self.kl_weight * self.kl() / values)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network in place, with the arguments of `torch.compile`; draws stay outside of it."""
        self.model.compile(*args, **kwargs)

    def predict(
        self,
        *args: Any,
        samples: int | None = None,
        member_chunk: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Predictive:
        """The predictive distribution for B examples, in eval mode and without gradients.

        Args:
            args, kwargs: inputs as the network takes them; `labels` are ignored.
            samples: S draws a member; `None` takes the posterior mean (S = 1).
            member_chunk: members computed at once; fewer bound the memory and change nothing else.
            seed: makes the draws reproducible; `None` takes one from torch's global generator.

        Returns:
            `Predictive` with outputs [K, S, B, ...].
        """
        for name, value in (("samples", samples), ("member_chunk", member_chunk)):
            if value is not None and value < 1:
                raise DataError(f"{name} must be at least 1; found {value}.")
        kwargs.pop("labels", None)
        if samples is not None and seed is None:
            seed = int(torch.randint(2**62, ()))
        call = partial(self.passes.outputs, args, kwargs, samples, seed, member_chunk)
        with self.alone, evaluating(self), torch.no_grad():
            outputs = self.settled(call, args, kwargs)
        return Predictive.of(outputs, resolve_task(outputs[0, 0], self.task), self.temperature, self.conformal)

    @property
    def generation_config(self) -> Any:
        """The network's own: what `generate` does where nothing else is asked for."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.model.generation_config = config

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: transformers' continuous batching would bypass the members."""
        raise BayesifyError(
            "generate_batch (continuous batching) is not supported with several networks; use generate."
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: the factors of the head would be lost."""
        raise BayesifyError("token embeddings are resized before the conversion: call unload(), resize, convert anew.")

    def merge_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: the factors of the adapter would be lost."""
        raise BayesifyError("adapters are merged before the conversion: call unload(), merge_adapter, convert anew.")

    def reset_classifier(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: the factors of the head would be lost."""
        raise BayesifyError("a head is changed before the conversion: call unload(), reset_classifier, convert anew.")

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that an optimizer is not to decay, as timm asks for them: factors, and the network's."""
        own: Callable[[], set[str]] = getattr(self.model, "no_weight_decay", set)
        slow = {id(parameter) for _, parameter in self.slow_parameters()}
        added = {name for name, parameter in self.named_parameters() if id(parameter) not in slow}
        return added | {f"model.{name}" for name in own()}

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **options: Any) -> Generation:
        """Text from the predictive, with the doubt of every token; see `bayesify.generation.generate`."""
        from bayesify.generation import generate

        return generate(self, inputs, generation_config, **options)

    @around
    def settled(self, call: Callable[[], T], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> T:
        """Make a call on inputs, and see on them where the batch is in each layer, as far as nothing told before.

        That is at the first call after a conversion without inputs, and whenever a layer finds rows that do not fit
        its factors. Layers whose input turns out not to carry the batch lose their factors.
        """
        with self.alone:
            return self.passes.settled(call, args, kwargs or {})

    # -------------------------------------------------------------------------------------------- objective

    def kl(self) -> Tensor:
        """KL of the posterior to the prior over all factors, a scalar in nats.

        Summed over sites and elements; over members it is averaged (`kl_reduction="mean"`, the convexity bound on the
        KL of the mixture) or summed ("sum", as the paper's released code). Where it is a Monte Carlo estimate, it draws
        from torch's global generator (`bayesify.distributions.kl_variance` gives its variance).
        """
        per_member = torch.stack([kl_divergence(factor) for factor, _ in self.passes.draws.joined()]).sum(0)
        return per_member.mean() if self.config.kl_reduction == "mean" else per_member.sum()

    def fit_spread(
        self,
        loader: Iterable[Any],
        method: Literal["fisher", "low-rank", "search"] = "fisher",
        *,
        prior_scale: float | None = None,
        validation: Iterable[Any] | None = None,
        seed: int = 0,
    ) -> SpreadFit:
        """Make a pretrained network Bayesian without training: spread its factors as far as data allow.

        Convert it with ``init="ones"``, so that all members are the network itself. The spread is that of the Laplace
        approximation in the space of the factors, whose precision is N · Fisher information + 1 / prior_scale².

        Args:
            loader: batches as `evaluate` takes them, of data like those the network was trained on.
            method: "fisher": the diagonal of the information, in one pass; sets the spread of every factor, which
                ``predict(samples=...)`` draws from, and keeps the means. "low-rank": also its strongest 20 directions,
                in one pass; the members' means become draws, in pairs around the network, and their own spread nearly
                0, so that plain calls are calibrated. Neither looks at labels. "search", in up to 11 passes: the one
                spread of all factors with the lowest NLL of the labels.
            prior_scale: standard deviation of a factor that the data say nothing of; `None` is 0.3, or what validation
                chooses.
            validation: labeled batches that choose prior_scale, by NLL. The marginal likelihood cannot: the network is
                the mean of the prior and its own optimum, so evidence falls with every wider prior.
            seed: of the labels and samples that are drawn.

        Raises:
            ConfigError: a posterior without a spread for each element; "low-rank" for members that differ.
            DataError: no examples, no labels where they are needed, or outputs that are not classes. Nothing is changed
                then.
        """
        from bayesify.calibration import fit_spread

        return fit_spread(self, loader, method=method, prior_scale=prior_scale, validation=validation, seed=seed)

    def fit_temperature(self, loader: Iterable[Any], *, samples: int | None = None, seed: int = 0) -> float:
        """Set the temperature that gives the predictive the lowest NLL on validation data, and return it.

        It divides the logits of every member and sample, so that members, mixture and mutual information stay one
        whole; `save_pretrained` keeps it, `state_dict` does not. Sets that were fitted before are dropped.

        Args:
            loader: labeled batches as `evaluate` takes them, of data that the model was not trained on.
            samples, seed: of the predictions, see `predict`.

        Raises:
            DataError: no examples, no labels, or outputs that are not logits. Nothing is changed then.
        """
        from bayesify.calibration import fit_temperature

        return fit_temperature(self, loader, samples=samples, seed=seed)

    def fit_sets(
        self, loader: Iterable[Any], *, penalty: float = 0.01, samples: int | None = None, seed: int = 0
    ) -> Conformal:
        """Keep what `predict(...).sets(alpha)` needs: sets that hold the true class with probability 1 − alpha.

        Split conformal prediction (APS; with the penalty RAPS), on the predictive as it is, so after `fit_temperature`
        if both are wanted; `save_pretrained` keeps it.

        Args:
            loader: labeled batches as `evaluate` takes them, like what the model will meet, which set nothing else of
                it, not the temperature either. A few hundred examples are enough, 1 / alpha is the least.
            penalty: on each class beyond the first five, for smaller sets where there are many classes.
            samples, seed: of the predictions, see `predict`. Predict with the same number of samples.

        Raises:
            DataError: no examples, or no labels.
            ConfigError: outputs that are not of one class an example. Nothing is changed then.
        """
        from bayesify.calibration import fit_sets

        return fit_sets(self, loader, penalty=penalty, samples=samples, seed=seed)

    # -------------------------------------------------------------------------------------------- ways out

    def merge(self, member: int = 0) -> nn.Module:
        """A plain copy of the network with one member's posterior-mean factors folded into its weights.

        Raises:
            ConversionError: a layer's own code transforms its weight so that factors cannot be folded into it.
        """
        if not -self.members <= member < self.members:
            raise BayesifyError(f"member {member} does not exist; there are {self.members} (0 to {self.members - 1}).")
        self.passes.parting.remove()
        with self.passes.draws.drawn(slice(None), 1, seed=None):
            return merged(self.model, member % self.members, tied=bool(self.report.tied))

    def fuse(
        self,
        samples: int | None = None,
        seed: int | None = None,
        *,
        weights: Literal["copies", "shared"] | None = None,
        example_inputs: Any = None,
    ) -> FusedModel:
        """A module for inference with the same call: fixed factors, merged with the weights and norms beside them.

        Args:
            samples: S draws of each member, which all examples share; `None` takes the posterior mean (S = 1).
            seed: makes the draws reproducible, those of `predict` where noise is per member; `None` takes one from
                torch's global generator.
            weights: "copies" folds the factors into weights of their own for each of K·S networks, which then cost what
                plain networks do; parameters without factors are shared. "shared" keeps one copy of all weights.
                `None` takes copies if they fit in half of the memory that is available, and factors can be folded.
            example_inputs: inputs of one call, as for `bayesify`; by default made for timm and transformers models. On
                them the merging of batch norms is checked; without any, only those that the code shows to be safe
                are merged.

        Raises:
            ConversionError: "copies" of a layer whose own code transforms its weight; or example inputs that do not
                fit, or are missing for a model that was never called.
        """
        from bayesify.fused import fuse

        return fuse(self, samples, seed, weights=weights, example_inputs=example_inputs)

    def unload(self) -> nn.Module:
        """Take the factors out again, in place, and return the original network.

        Slow weights keep what training made of them; batch norms of each member's own leave their average statistics.
        """
        restore(list(self.model.modules()))
        self.passes.forget()
        return self.model

    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:
        """Write the model to a folder; see `bayesify.hub.save_pretrained`."""
        from bayesify.hub import save_pretrained

        return save_pretrained(self, folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to the Hugging Face Hub; see `bayesify.hub.push_to_hub`."""
        from bayesify.hub import push_to_hub

        return push_to_hub(self, repo_id, **options)
