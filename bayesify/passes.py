"""Forward passes of K members: what goes in, which draws are in force, and what comes out.

A compiler sees the network and nothing of this: what prepares a pass, and what follows it, runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from bayesify.batch import Rows, are_plain, map_tensors
from bayesify.config import Rank1Config
from bayesify.draws import Draws
from bayesify.errors import DataError, RowsError
from bayesify.graph import ConversionReport, Cut, Parting, observe, site_name, take_out, watched_outputs
from bayesify.layers import Rank1Functional, Rank1Layer
from bayesify.modes import evaluating, full_float32
from bayesify.strategy import Strategies, Strategy
from bayesify.tasks import TaskName, task_of

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def outside(function: F) -> F:
    """Not compiled, nor anything that it calls."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


def around(function: F) -> F:
    """Not compiled, but for the network that it calls."""
    return torch.compiler.disable(function, recursive=False)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Run:
    """Inputs of B examples, where members part, and which of them are computed at once."""

    rows: Rows
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int
    cut: Cut | None
    parts: list[slice]


class Passes:
    """All passes of one network.

    Attributes:
        draws: the draws in force during a pass.
        strategies: how members are computed, for each kind of inputs.
        parting: where B rows become K·B, during a pass.
    """

    def __init__(self, model: nn.Module, config: Rank1Config, report: ConversionReport) -> None:
        self._model = model
        self._members = config.members
        self._noise = config.noise
        self._report = report
        self.draws = Draws(model, config)
        self.draws.check()
        self.strategies = Strategies(model)
        self.parting = Parting(model)
        self._seen_one = False
        """Whether members were compared on a single example alone, whose rows cannot change places."""

    def forget(self) -> None:
        """What was seen of the network's structure."""
        self.draws.forget()
        self.strategies.forget()
        self.parting.remove()

    # -------------------------------------------------------------------------------------------- kinds of passes

    @around
    def train(self, args: tuple[Any, ...], kwargs: dict[str, Any], partition: bool) -> Any:
        """K·B rows of output, or B of a partitioned batch.

        The draws stay in place: gradient checkpointing runs layers again in the backward pass.
        """
        args, kwargs, random_draws = self._enter_training(args, kwargs, partition)
        output = self._leave(self._network(args, kwargs))
        if random_draws:
            _move_on()
        return output

    @around
    def mixture(self, args: tuple[Any, ...], kwargs: dict[str, Any], task: TaskName | None, temperature: float) -> Any:
        """B rows: the predictive at the posterior means."""
        run = self._run(args, kwargs, single=True, chunk=None, joins=True)
        return self._reduced(run, [self._pass(run, part, None) for part in run.parts], task, temperature)

    @around
    def outputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int | None, seed: int | None, chunk: int | None
    ) -> Tensor:
        """[K, S, B, ...] outputs of S draws a member, or at the posterior means; `chunk` members at once."""
        run = self._run(args, kwargs, samples is None or self._noise == "member", chunk, joins=False)
        keys = [None] if samples is None else [(seed, sample) for sample in range(samples)]
        found = [[self._members_of(run, part, self._pass(run, part, key)) for part in run.parts] for key in keys]
        return _stacked(found)

    @around
    def _pass(self, run: _Run, members: slice, seed: Any) -> Any:
        """The output of the network for k members on B examples, of k·B rows."""
        try:
            args, kwargs = self._enter(run, members, seed)
            return self._leave(self._kept(self._network(args, kwargs)))
        finally:
            self._end()

    def _network(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is compiled, if anything is. A container of torch's own has no code that a compiler begins with."""
        return self._model(*args, **kwargs)

    # -------------------------------------------------------------------------------------------- before and after

    @outside
    def _enter_training(self, args: tuple[Any, ...], kwargs: dict[str, Any], partition: bool) -> Any:
        """The inputs of the network, and whether draws are random, with draws in place."""
        self.draws.check()
        rows = Rows(self._model)
        batch = rows.batch_size(args, kwargs)
        if partition:
            if batch % self._members:
                raise DataError(
                    f"a batch of {batch} examples cannot be partitioned among {self._members} members; "
                    f"give a multiple of {self._members}."
                )
            batch //= self._members
            self.parting.end()
        else:
            cut = self._strategy(rows, args, kwargs).cut
            args, kwargs = self.parting.enter(rows, args, kwargs, batch, self._members, cut)
        return args, kwargs, self.draws.hold(slice(None), batch, seed=_peek_seed())

    @outside
    def _enter(self, run: _Run, members: slice, seed: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.draws.hold(members, run.batch, seed)
        count = members.stop - members.start
        return self.parting.enter(run.rows, run.args, run.kwargs, run.batch, count, run.cut)

    @outside
    def _kept(self, output: Any) -> Any:
        """A copy, on a GPU, of what a compiled network gives: replaying a CUDA graph writes over it."""
        if self._model._compiled_call_impl is None:
            return output
        return map_tensors(
            output, lambda value: value.clone() if isinstance(value, Tensor) and value.is_cuda else value
        )

    @outside
    def _leave(self, output: Any) -> Any:
        return self.parting.leave(output)

    @outside
    def _end(self) -> None:
        self.draws.release()
        self.parting.end()

    @outside
    def _reduced(self, run: _Run, outputs: list[Any], task: TaskName | None, temperature: float) -> Any:
        rows = run.parts[0].stop * run.batch
        output = outputs[0] if len(outputs) == 1 else run.rows.joined(outputs, rows)
        return run.rows.reduce(output, self._members, run.batch, task, temperature)

    @outside
    def _members_of(self, run: _Run, members: slice, output: Any) -> Tensor:
        """[k, B, ...]"""
        main = run.rows.outputs(output).movedim(run.rows.input_dim, 0)
        count = members.stop - members.start
        if len(main) % count:
            raise DataError(
                f"the network gave {len(main)} rows for {run.batch} examples and {count} members. The batch must be "
                "the first dimension of its inputs and outputs."
            )
        return main.unflatten(0, (count, len(main) // count))

    # -------------------------------------------------------------------------------------------- looking

    @outside
    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], single: bool, chunk: int | None, joins: bool) -> _Run:
        """How to compute all members: `chunk` at once, or as many as cost least.

        Args:
            single: whether the rows of one member share a draw.
            joins: whether all that the network gives is to be joined, which is not possible with any output.
        """
        self.draws.check()
        rows = Rows(self._model)
        strategy = self._strategy(rows, args, kwargs)
        k = self._members
        if chunk is None:
            chunk = k if joins and not strategy.plain else strategy.members_at_once(k, args, kwargs, single)
        parts = [slice(start, min(start + chunk, k)) for start in range(0, k, chunk)]
        return _Run(rows, args, kwargs, rows.batch_size(args, kwargs), strategy.cut, parts)

    def _strategy(self, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Strategy:
        """The strategy for such inputs. That parting late changes nothing is seen on the first of them."""
        self.draws.release()
        with torch.compiler.set_stance("force_eager"):
            strategy = self.strategies.of(args, kwargs)
            if strategy.cut is not None and not strategy.verified and self._members > 1:
                self._verify(strategy, strategy.cut, rows, args, kwargs)
        return strategy

    def _verify(self, strategy: Strategy, cut: Cut, rows: Rows, args: Any, kwargs: Any) -> None:
        everyone, batch = slice(0, self._members), rows.batch_size(args, kwargs)
        with evaluating(self._model), full_float32(), torch.no_grad():
            early, late = (
                rows.outputs(self._pass(_Run(rows, args, kwargs, batch, where, [everyone]), everyone, None))
                for where in (None, cut)
            )
        strategy.verified = True
        if early.shape != late.shape or not torch.allclose(early, late, *_close(early)):
            self._part_at_once(strategy, cut)

    def _part_at_once(self, strategy: Strategy, cut: Cut) -> None:
        """Give up a cut."""
        strategy.cut = None
        self._report.notes.append(f"members could not part at {cut.at!r}: the code after it treats rows differently")

    @around
    def settled(self, call: Callable[[], T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        """Make a call on inputs, and see on them where the batch is in each layer, as far as nothing told before.

        That is at the first call after a conversion without inputs, and whenever a layer finds rows that do not fit
        its factors. Layers whose input turns out not to carry the batch lose their factors.
        """
        try:
            if self._report.unsettled:
                self._settle(args, kwargs)
                self._check_separate(args, kwargs)
            elif self._seen_one and Rows(self._model).batch_size(args, kwargs) > 1:
                self._check_separate(args, kwargs)
            return self._retried(call, args, kwargs)
        except RuntimeError as error:
            if "enforce_sorted" not in str(error):
                raise
            raise DataError(
                "sequences sorted by length are not sorted any more with several members, one after the other: have "
                "the network call pack_padded_sequence(..., enforce_sorted=False)."
            ) from error

    @around
    def _retried(self, call: Callable[[], T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        try:
            return call()
        except RowsError:
            if not self._settle(args, kwargs):
                raise
            return call()
        except Exception:
            # Code after a cut may raise, at its verification or later on other values: masks with padding, say.
            strategy = self._known_strategy(args, kwargs)
            cut = strategy.cut
            if cut is None:
                raise
            strategy.cut = None
            try:
                result = call()
            except Exception:
                strategy.cut = cut  # it was something else
                raise
            self._part_at_once(strategy, cut)
            return result

    @outside
    def _known_strategy(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Strategy:
        return self.strategies.of(args, kwargs)

    @outside
    def _settle(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Look for the batch; returns whether anything new was found.

        What has a state of its own, such as a cache, would be changed by a look: such inputs leave things as they are.
        """
        if not are_plain((args, kwargs)):
            return False
        self.draws.release()
        self._report.unsettled = False
        known = self._report.batch_dims
        layers = {name: layer for name, layer in self._model.named_modules() if isinstance(layer, Rank1Layer)}
        functional = {name: layer.rank1.roles for name, layer in layers.items() if isinstance(layer, Rank1Functional)}
        with torch.compiler.set_stance("force_eager"):
            found = observe(self._model, (args, kwargs), layers, functional, values=True)
        if found is None:
            return False
        news = False
        for name, layer in layers.items():
            for weight, site in list(layer.rank1.items()):
                path = site_name(name, weight)
                if path in found.without:
                    parameters = sum(parameter.numel() for parameter in site.parameters())
                    self._report.leave_out(path, found.without[path], parameters)
                    take_out(layer, weight)
                    self.forget()
                    news = True
                elif found.dims.get(path) and path not in known:
                    known[path] = site.batch_dim = found.dims[path]  # type: ignore[assignment]
                    news = True
        return news

    @outside
    def _check_separate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See that two members side by side give what they give alone, where nobody has tried it: in a network that is
        neither timm's nor transformers', converted without inputs.

        Raises:
            RowsError: they do not. The layer is named at which they first differ.
        """
        if self._members == 1 or task_of(self._model) is not None or not are_plain((args, kwargs)):
            return
        rows = Rows(self._model)
        batch = rows.batch_size(args, kwargs)

        def outputs(first: int) -> Tensor:
            part = slice(first, 2)
            return rows.outputs(self._pass(_Run(rows, args, kwargs, batch, None, [part]), part, None))

        before = torch.get_rng_state()
        with evaluating(self._model), full_float32(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            try:
                both, alone = outputs(0), outputs(1)
            except RowsError:
                self._report.unsettled = True
                raise
            except Exception:
                return  # the call itself will say why
            self._seen_one = batch == 1
            separate = _holds_second(both, alone)
            if not torch.equal(before, torch.get_rng_state()):
                torch.set_rng_state(before)  # random in evaluation, too: not to be compared
                return
            if separate:
                return
            with self._noted_outputs() as of_both:
                outputs(0)
            with self._noted_outputs() as of_one:
                outputs(1)
        pairs = zip(of_both, of_one, strict=False)
        name = next((name for (name, pair), (_, one) in pairs if not _holds_second(pair, one)), None)
        if name is None:
            return  # code between the layers looks at the number of rows, which is the network's own business
        self._report.unsettled = True
        raise RowsError(
            f"members are mixed in {name!r}: computed together, they give other outputs than one by one. The rows of "
            "its input do not lie member by member: it is the same for all examples, or the data of a packed sequence, "
            "or was sorted, or has its time before its batch. Put the batch first, have pack_padded_sequence sort "
            "(enforce_sorted=False), or leave the layer out with exclude=."
        )

    @contextmanager
    def _noted_outputs(self) -> Iterator[list[tuple[str, Tensor]]]:
        """What each layer with factors gives, call by call."""
        noted: list[tuple[str, Tensor]] = []

        def note(name: str, output: Any) -> None:
            if isinstance(output, PackedSequence):
                output = pad_packed_sequence(output, batch_first=True)[0]
            if isinstance(output, Tensor):
                noted.append((name, output))

        layers = [name for name, layer in self._model.named_modules() if isinstance(layer, Rank1Layer)]
        with watched_outputs(self._model, layers, note):
            yield noted


def _holds_second(both: Tensor, alone: Tensor) -> bool:
    """Whether the second half of some dimension is what a member gives by itself; so are outputs of other shapes."""
    dims = [d for d in range(both.dim()) if both.dim() == alone.dim() and both.shape[d] == 2 * alone.shape[d]]
    halves = [half for d in dims if (half := both.chunk(2, d)[1]).shape == alone.shape]
    if both.shape == alone.shape:
        halves = [both]
    return not halves or any(torch.allclose(half, alone, *_close(alone), equal_nan=True) for half in halves)


def _close(values: Tensor) -> tuple[float, float]:
    """Relative and absolute tolerance within which two ways to compute the same agree."""
    epsilon = torch.finfo(values.dtype).eps ** 0.5
    return epsilon, epsilon * float(values[values.isfinite()].abs().amax()) if values.isfinite().any() else 0.0


@outside
def _stacked(found: list[list[Tensor]]) -> Tensor:
    """[K, S, B, ...] of the parts [k, B, ...] of each sample; what is whole is not copied."""
    samples = [parts[0] if len(parts) == 1 and _is_whole(parts[0]) else torch.cat(parts) for parts in found]
    return samples[0].unsqueeze(1) if len(samples) == 1 else torch.stack(samples, 1)


def _is_whole(value: Tensor) -> bool:
    """Whether it is all that its memory holds: of a slice, the rest would live as long."""
    return type(value) is Tensor and value.untyped_storage().nbytes() == value.numel() * value.element_size()


@outside
def _move_on() -> None:
    """Move the random stream on, so that the next forward draws anew."""
    torch.randint(2, ())


def _peek_seed() -> tuple[str, int]:
    """A seed from torch's global CPU generator that leaves the generator as it was.

    So factors at spread zero do not disturb the network's own random numbers (dropout), and still follow
    `torch.manual_seed`.
    """
    state = torch.get_rng_state()
    seed = int(torch.randint(2**62, ()))
    torch.set_rng_state(state)
    return ("train", seed)
