"""Rank-1 recurrent layers: factors on W_ih, W_hh (and W_hr) of every layer and direction, drawn once per sequence.

One s a kernel is shared by all gates; r has one entry for each gate and unit. Two ways to compute the same thing:

* few draws (members): fold W ∘ r sᵀ and call the layer's own fused kernel once a draw; at the posterior means of an
  LSTM, what was folded is kept for the next call (`lstm`);
* one draw a sequence: run the cells step by step, all sequences at once; an LSTM's as one operation (`scan`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bayesify.errors import BayesifyError, DataError, RowsError
from bayesify.layers import lstm
from bayesify.layers.gates import GateKernel, step_of
from bayesify.layers.linear import fold_matrix
from bayesify.layers.maps import DENSE
from bayesify.layers.product import product, scratch
from bayesify.layers.registry import Rank1Layer, bias_of, is_exact, original_class, rank1
from bayesify.layers.scan import scan, signs
from bayesify.layers.site import AdditiveSite, Site, check_channels

State = Any
"""Initial or final state: a tensor, a pair of tensors (LSTM) or None."""


class _Recurrent(Rank1Layer):
    """What layers and cells share: several weights, and folding a draw into them."""

    @classmethod
    def sizes(cls, layer: Any) -> dict[str, tuple[int, int]]:
        weights = {name: p for name, p in layer.named_parameters(recurse=False) if name.startswith("weight")}
        return {name: (p.shape[1], p.shape[0]) for name, p in weights.items()}

    def folded(self, name: str, s: Tensor | None, r: Tensor | None) -> Tensor:
        return fold_matrix(getattr(self, name), s, r, self.__dict__.get("_memory", {}).get(name))

    def applied(self, name: str, s: Tensor) -> Tensor:
        return F.linear(s, getattr(self, name))

    @property
    def sites(self) -> dict[str, Site]:
        return dict(self.rank1.items())  # type: ignore[arg-type]

    @property
    def draws(self) -> int:
        """R, the number of draws in force (the largest among the sites)."""
        return max(site.rows for site in self.sites.values())

    @property
    def members(self) -> int:
        return max(site.members for site in self.sites.values())

    def _memory_of_weights(self) -> dict[str, Tensor | None]:
        """Where the weights of one draw after the other are folded to, in inference."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return {}
        return dict(zip(self.sites, scratch([getattr(self, name) for name in self.sites]), strict=True))

    @contextmanager
    def _weights_of(self, draw: int, memory: dict[str, Tensor | None]) -> Iterator[None]:
        """Put the weights folded with one draw in place, so that the layer's own forward uses them."""
        self.__dict__["_memory"] = memory
        folded: dict[str, Tensor] = {}
        try:
            for name, site in self.sites.items():
                weight, bias = self.with_draw(name, min(draw, site.rows - 1))
                folded[name] = weight
                if bias is not None and bias_of(name) in self._parameters:
                    folded[bias_of(name)] = bias
        finally:
            self.__dict__.pop("_memory", None)
        before = {name: self._parameters[name] for name in folded}
        flat = getattr(self, "_flat_weights", None)
        try:
            self._parameters.update(folded)  # type: ignore[arg-type]
            if flat is not None:
                names = self._flat_weights_names
                self.__dict__["_flat_weights"] = [self._parameters[name] for name in names]  # type: ignore[union-attr]
            yield
        finally:
            self._parameters.update(before)
            if flat is not None:
                self.__dict__["_flat_weights"] = flat


# ------------------------------------------------------------------------------------------------ layers


class _Rank1RNN(_Recurrent):
    """LSTM, GRU and RNN with layers, directions, projections, packed sequences and given initial states."""

    def forward(self, input: Tensor | PackedSequence, hx: State = None) -> tuple[Any, State]:  # type: ignore[override]
        if isinstance(input, Tensor) and input.dim() != 3:
            raise BayesifyError(
                f"a rank-1 recurrent layer needs a batched input [N, T, in]; found {tuple(input.shape)}."
            )
        check_channels(input.data if isinstance(input, PackedSequence) else input, -1, self.input_size)  # type: ignore[arg-type]
        self._check_state(input, hx)
        if self.draws > self.members or not self._foldable:
            if is_exact(original_class(type(self))):
                return self._by_steps(input, hx)
            if not self._foldable:
                raise BayesifyError(
                    f"{original_class(type(self)).__name__} has no bias that added factors could be folded into; "
                    "leave it out with exclude=, or multiply factors."
                )
        kept = self._kept(input, hx)
        return self._by_steps(input, hx) if kept is None and self._scans(input) else self._by_draws(input, hx, kept)

    def _check_state(self, input: Tensor | PackedSequence, hx: State) -> None:
        """Raise `DataError` if a state that was given has not the rows of the input."""
        if hx is None or torch.compiler.is_compiling():
            return
        packed = isinstance(input, PackedSequence)
        rows = int(input.batch_sizes[0]) if packed else input.shape[0 if self.batch_first else 1]
        for state in hx if isinstance(hx, tuple) else (hx,):
            if state.dim() != 3 or state.shape[1] != rows:
                raise DataError(
                    f"the initial state of a recurrent layer must be [layers, {rows} rows, features]; found "
                    f"{tuple(state.shape)}. Only inputs with the batch in their first dimension are repeated for "
                    "members: give states as [batch, layers, features], and transpose them inside the network."
                )

    def _kept(self, input: Tensor | PackedSequence, hx: State) -> list[lstm.Packed] | None:
        """The weights of each draw, folded and packed, where they are kept from call to call: at posterior means."""
        layer: Any = self
        if not self._scannable or not lstm.fits(layer, input, hx):
            return None
        sites, draws = self.sites.values(), self.draws
        factors = [factor for site in sites for factor in (site.s, site.r) if factor is not None]
        if not factors or not all(factor.at_mean for factor in factors):
            return None
        parts = [*factors, *(site.own_bias for site in sites if site.own_bias is not None)]
        together = torch.cat([part.value().expand(draws, -1) for part in parts], 1)
        return None if together.requires_grad else lstm.kept(layer, together, self.members, self._pack_draw)

    def _pack_draw(self, draw: int) -> lstm.Packed:
        with self._weights_of(draw, {}):
            return lstm.pack(self)  # type: ignore[arg-type]

    def _scans(self, input: Tensor | PackedSequence) -> bool:
        """Whether, in inference, all rows go through one operation: with a row or two a draw, folding costs more."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if self.draws == 1 or not isinstance(input, Tensor) or input.device.type != "cpu":
            return False
        few = input.shape[0 if self.batch_first else 1] in (self.draws, 2 * self.draws)
        return few and self._scannable

    @property
    def _scannable(self) -> bool:
        """Whether a layer and direction can be one operation: torch's LSTM, without projections, factors multiplied."""
        plain = isinstance(self, nn.LSTM) and not self.proj_size and is_exact(original_class(type(self)))
        return plain and all(type(site) is Site for site in self.sites.values())

    @property
    def _foldable(self) -> bool:
        """Whether a draw can be put into weights and biases: what is added needs a bias to go to."""
        sites = self.sites.items()
        return not any(isinstance(s, AdditiveSite) and bias_of(name) not in self._parameters for name, s in sites)

    @classmethod
    def own_forward(cls) -> Callable[..., Any]:
        return _Rank1RNN.forward

    def _by_draws(self, input: Tensor | PackedSequence, hx: State, kept: list[lstm.Packed] | None) -> tuple[Any, State]:
        """Fold each draw and call the layer's own forward on the rows that share it."""
        draws = self.draws
        memory = {} if kept is not None else self._memory_of_weights()
        if draws == 1:
            return self._of_draw(0, input, hx, memory, kept)
        lengths = None
        batch_dim = 0 if self.batch_first else 1
        x: Tensor = input  # type: ignore[assignment]
        if isinstance(input, PackedSequence):
            x, lengths = pad_packed_sequence(input, batch_first=bool(self.batch_first))
        rows = _rows_per_draw(x.shape[batch_dim], draws)
        outputs, states = [], []
        for draw in range(draws):
            part: Any = x.narrow(batch_dim, draw * rows, rows)
            if lengths is not None:
                here = lengths[draw * rows : (draw + 1) * rows]
                part = pack_padded_sequence(part, here, bool(self.batch_first), enforce_sorted=False)
            state = _map_state(hx, lambda t, d=draw: t.narrow(1, d * rows, rows).contiguous())
            result = self._of_draw(draw, part, state, memory, kept)
            if not isinstance(result, tuple) or len(result) != 2:
                raise BayesifyError(
                    f"{original_class(type(self)).__name__} does not return (output, state) as torch's layer does; "
                    "register an equivalent with @rank1, or leave it out with exclude=."
                )
            output, state = result
            if lengths is not None:
                output, _ = pad_packed_sequence(output, bool(self.batch_first), total_length=x.shape[1 - batch_dim])
            outputs.append(output)
            states.append(state)
        output = torch.cat(outputs, batch_dim)
        if isinstance(input, PackedSequence):
            output = _pack_like(output, input, batch_dim)
        if isinstance(states[0], tuple):
            return output, tuple(torch.cat(parts, 1) for parts in zip(*states, strict=True))
        return output, torch.cat(states, 1)

    def _of_draw(
        self, draw: int, x: Any, hx: State, memory: dict[str, Tensor | None], kept: list[lstm.Packed] | None
    ) -> Any:
        """What the layer's own forward gives with a draw folded into its weights."""
        if kept is not None:
            return lstm.run(self, kept[draw], x, hx)  # type: ignore[arg-type]
        with self._weights_of(draw, memory):
            return super(Rank1Layer, self).forward(x, hx)  # type: ignore[misc]

    def _by_steps(self, input: Tensor | PackedSequence, hx: State) -> tuple[Any, State]:
        """Run the cells over time on all rows at once. Legend: n rows active at a step, total = Σ n over steps."""
        if isinstance(input, PackedSequence):
            data, sizes, order = input.data, input.batch_sizes.tolist(), input.sorted_indices
        else:
            steps_first = input.transpose(0, 1) if self.batch_first else input
            data, sizes, order = steps_first.flatten(0, 1), [steps_first.shape[1]] * steps_first.shape[0], None
        rows = sizes[0]
        initial = self._initial_state(hx, rows, order, data)
        directions = 2 if self.bidirectional else 1
        finals: list[tuple[Tensor, ...]] = []
        num_layers: int = self.num_layers  # type: ignore[assignment]
        for number in range(num_layers):
            outputs = []
            for direction in range(directions):
                name = f"l{number}{'_reverse' if direction else ''}"
                state = tuple(part[number * directions + direction] for part in initial)
                output, state = self._scan(name, data, sizes, state, order, reverse=bool(direction))
                outputs.append(output)
                finals.append(state)
            data = torch.cat(outputs, -1)
            if self.dropout and number < num_layers - 1:
                data = F.dropout(data, self.dropout, self.training)  # type: ignore[arg-type]
        final = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        if isinstance(input, PackedSequence):
            if input.unsorted_indices is not None:
                final = tuple(part.index_select(1, input.unsorted_indices) for part in final)
            output = PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
        else:
            output = data.unflatten(0, (len(sizes), rows))
            output = output.transpose(0, 1) if self.batch_first else output
        return output, final if isinstance(self, nn.LSTM) else final[0]

    def _scan(
        self,
        name: str,
        data: Tensor,
        sizes: list[int],
        state: tuple[Tensor, ...],
        order: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer in one direction: data [total, in] -> output [total, out] and the final state."""
        kernels = {
            part: GateKernel(self, f"weight_{part}_{name}", sizes[0], order, data.dtype)
            for part in ("ih", "hh", "hr")
            if f"weight_{part}_{name}" in self.rank1
        }
        fused = self._fused(kernels, data, sizes, state, reverse)
        if fused is not None:
            return fused
        step, project = step_of(self), kernels.get("hr")
        index = torch.cat([torch.arange(n, device=data.device) for n in sizes])
        gates = kernels["ih"](data, index).split(sizes)
        outputs: list[Tensor] = []
        for gate in reversed(gates) if reverse else gates:
            n = gate.shape[0]
            active = tuple(part[:n] for part in state)
            new = step(gate, kernels["hh"](active[0], slice(0, n)), active)
            if project is not None:
                new = (project(new[0], slice(0, n)), *new[1:])
            outputs.append(new[0])
            # Rows beyond n have ended (forward) or not begun (reverse): they keep their state.
            state = tuple(torch.cat([a, b[n:]]) if n < b.shape[0] else a for a, b in zip(new, state, strict=True))
        return torch.cat(outputs[::-1] if reverse else outputs), state

    def _fused(
        self, kernels: dict[str, GateKernel], data: Tensor, sizes: list[int], state: tuple[Tensor, ...], reverse: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The same as one operation: of an LSTM without projections, on sequences of one length, if it applies."""
        rows = sizes[0]
        if not self._scannable or set(kernels) != {"ih", "hh"} or sizes[-1] != rows:
            return None
        if torch.is_autocast_enabled(data.device.type) or any(part.dtype != data.dtype for part in state):
            return None
        if data.dtype not in (torch.float32, torch.float64):
            return None
        ih, hh = kernels["ih"], kernels["hh"]
        of_gates = signs(hh.weight.shape[1], data).unsqueeze(0)
        bias = None if ih.bias is None or hh.bias is None else (ih.bias + hh.bias) * of_gates
        r_of_x, r = (of_gates if v is None else v * of_gates for v in (ih.r, hh.r))
        s, r_of_x, bias = (None if v is None else v.unsqueeze(0) for v in (ih.s, r_of_x, bias))
        x = data.unflatten(0, (len(sizes), rows)).contiguous()
        gates = product(x, ih.weight, bias, s, r_of_x, DENSE, single=False)
        if gates is None:
            return None
        output, final = scan(gates, hh.weight, hh.s, r, (state[0], state[1]), reverse)
        return output.flatten(0, 1), final

    def _initial_state(self, hx: State, rows: int, order: Tensor | None, data: Tensor) -> tuple[Tensor, ...]:
        if hx is None:
            layers = self.num_layers * (2 if self.bidirectional else 1)  # type: ignore[operator]
            sizes = [self.proj_size or self.hidden_size] + ([self.hidden_size] if isinstance(self, nn.LSTM) else [])
            return tuple(data.new_zeros(layers, rows, size) for size in sizes)  # type: ignore[arg-type]
        states = hx if isinstance(hx, tuple) else (hx,)
        return states if order is None else tuple(part.index_select(1, order) for part in states)


@rank1(nn.LSTM)
class Rank1LSTM(_Rank1RNN, nn.LSTM): ...


@rank1(nn.GRU)
class Rank1GRU(_Rank1RNN, nn.GRU): ...


@rank1(nn.RNN)
class Rank1RNN(_Rank1RNN, nn.RNN): ...


# ------------------------------------------------------------------------------------------------ cells


class _Rank1Cell(_Recurrent):
    """A single step; several calls in one forward share one draw."""

    def forward(self, input: Tensor, hx: State = None) -> State:  # type: ignore[override]
        if input.dim() != 2:
            raise BayesifyError(f"a rank-1 recurrent cell needs a batched input [N, in]; found {tuple(input.shape)}.")
        check_channels(input, -1, self.input_size)  # type: ignore[arg-type]
        rows = input.shape[0]
        lstm = isinstance(self, nn.LSTMCell)
        if hx is None:
            hx = input.new_zeros(rows, self.hidden_size)  # type: ignore[arg-type]
            hx = (hx, hx) if lstm else hx
        state = hx if lstm else (hx,)
        everything = slice(0, rows)
        gx, gh = (
            GateKernel(self, name, rows, None, input.dtype)(value, everything)
            for name, value in (("weight_ih", input), ("weight_hh", state[0]))
        )
        new = step_of(self)(gx, gh, state)
        return new if lstm else new[0]

    def _own(self, input: Tensor, hx: State = None) -> State:
        """For a subclass: its own forward, once a draw, with the draw folded into its weights."""
        rows = _rows_per_draw(input.shape[0], self.draws)
        parts, memory = [], self._memory_of_weights()
        for draw in range(self.draws):
            here = slice(draw * rows, (draw + 1) * rows)
            with self._weights_of(draw, memory):
                parts.append(super(Rank1Layer, self).forward(input[here], _map_state(hx, lambda t, h=here: t[h])))  # type: ignore[misc]
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(part) for part in zip(*parts, strict=True))
        return torch.cat(parts)

    @classmethod
    def own_forward(cls) -> Callable[..., Any]:
        return _Rank1Cell._own


@rank1(nn.LSTMCell)
class Rank1LSTMCell(_Rank1Cell, nn.LSTMCell): ...


@rank1(nn.GRUCell)
class Rank1GRUCell(_Rank1Cell, nn.GRUCell): ...


@rank1(nn.RNNCell)
class Rank1RNNCell(_Rank1Cell, nn.RNNCell): ...


# ------------------------------------------------------------------------------------------------ helpers


def _rows_per_draw(rows: int, draws: int) -> int:
    if rows % draws:
        raise RowsError(
            f"a rank-1 recurrent layer got {rows} rows, which is no multiple of the {draws} draws of its factors. "
            "Call the BayesianModel, not the network inside it; and give it the rows of all examples at once, or leave "
            "the layer out with exclude=."
        )
    return rows // draws


def _map_state(hx: State, function: Callable[[Tensor], Tensor]) -> State:
    if hx is None:
        return None
    return tuple(map(function, hx)) if isinstance(hx, tuple) else function(hx)


def _pack_like(padded: Tensor, like: PackedSequence, batch_dim: int) -> PackedSequence:
    """Pack padded outputs in the exact layout of another packed sequence."""
    if like.sorted_indices is not None:
        padded = padded.index_select(batch_dim, like.sorted_indices)
    lengths = (like.batch_sizes.unsqueeze(1) > torch.arange(padded.shape[batch_dim])).sum(0)
    data = pack_padded_sequence(padded, lengths, batch_first=batch_dim == 0, enforce_sorted=True).data
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)
