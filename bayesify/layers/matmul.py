"""Products of matrices in the widest instructions that a processor has.

MKL, in which torch multiplies dense layers on x86, runs at the rate of AVX2 on AMD's processors with AVX-512;
oneDNN, in which torch computes convolutions and recurrent layers, takes half the time there, and three quarters where
such an instruction is carried out in two halves (measured on two generations of the EPYC). Where MKL is as wide, it
reads a large weight several times for a few rows, as in a step of a decoder. On Intel's processors it reads it once if
the rows are columns (measured on a Xeon); on AMD's without AVX-512, up to seven rows take half the time as columns, and
more of them six to nine tenths of it in oneDNN (measured on an EPYC of the third generation).
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST = 1 << 19
"""Number of multiplications below which calling oneDNN takes longer than it saves."""
COLUMNS = range(8, 25)
"""Numbers of rows that MKL multiplies with a large weight sooner as columns."""
COLUMNS_ON_AMD, FEW_ROWS_ON_AMD = range(2, 8), range(8, 65)
"""The same for MKL without AVX-512 on AMD's processors, and numbers of rows that oneDNN multiplies sooner there."""
LARGE_WEIGHT = 1 << 20
"""Number of elements: more than the cache of a core holds."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for x [..., in] and W [out, in], which may be a transposed view or packed; what `F.linear` computes."""
    packed = weight.is_mkldnn
    way = "oneDNN" if packed else _way(x, weight, bias)
    if way != "oneDNN":
        return _by_columns(x, weight, bias) if way == "columns" else F.linear(x, weight, bias)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if packed:
        rows = rows if _is_matrix(rows) else rows.contiguous()
    elif not (_is_matrix(rows) and _is_matrix(weight)):
        return F.linear(x, weight, bias)
    y = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return _as_rows_of(x, y)


def packed(weight: Tensor, like: Tensor) -> Tensor:
    """A weight laid out as oneDNN wants it, for several products with inputs like this one; itself, if they would be
    none of oneDNN's.

    oneDNN would lay it out anew for each of them, which takes as long as the product of a hundred rows.
    """
    if not (_way(like, weight) == "oneDNN" and _is_matrix(weight)):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), like.numel() // like.shape[-1])


def _way(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Literal["oneDNN", "columns", "torch"]:
    """Which way to a product of such tensors is the soonest; oneDNN's also depends on how they lie in memory."""
    if torch.compiler.is_compiling() or x.shape[-1] != weight.shape[1]:  # torch's error says which sizes were found
        return "torch"
    if has_wider_onednn():
        onednn, columns = x.numel() * weight.shape[0] >= SMALLEST, False
    else:
        on_amd = has_onednn_on_amd()
        if weight.numel() < (SMALLEST if on_amd else LARGE_WEIGHT):
            return "torch"
        rows = x.numel() // x.shape[-1]
        onednn = on_amd and rows in FEW_ROWS_ON_AMD
        columns = rows in (COLUMNS_ON_AMD if on_amd else COLUMNS)
        columns = columns and torch.backends.mkl.is_available() and weight.is_contiguous()
    if not (onednn or columns) or not is_plain(x, weight, bias):
        return "torch"
    return "oneDNN" if onednn else "columns"


def _by_columns(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b as the transpose of W xᵀ + b."""
    columns = x.reshape(-1, x.shape[-1]).t()
    if columns.shape[1] not in COLUMNS_ON_AMD:
        columns = columns.contiguous()
    y = torch.mm(weight, columns) if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
    return _as_rows_of(x, y.t().contiguous())


def _as_rows_of(x: Tensor, y: Tensor) -> Tensor:
    """y [n, out] as [..., out]; no view to autograd, as a ReLU in place could not change one that a function gives."""
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors of float32 on a CPU, and no gradients, compiler, autocast or transform follows
    them."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    given = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return False
    return all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu" for t in given)


def _is_matrix(value: Tensor) -> bool:
    """Whether rows or columns lie one after the other in memory."""
    (rows, columns), (down, across) = value.shape, value.stride()
    return (across == 1 and down >= columns) or (down == 1 and across >= rows)


@cache
def has_onednn() -> bool:
    """Whether oneDNN is there and has AVX-512 on this processor."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()


@cache
def has_wider_onednn() -> bool:
    """Whether oneDNN has AVX-512 on this processor and BLAS has not."""
    return has_onednn() and has_onednn_on_amd()


@cache
def has_onednn_on_amd() -> bool:
    """Whether there are both oneDNN and MKL, on a processor whose maker is not MKL's."""
    backends = torch.backends
    return backends.mkldnn.is_available() and backends.mkl.is_available() and _maker() == "AuthenticAMD"


def _maker() -> str:
    """The identity that an x86 processor gives itself; empty if it cannot be had."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().rpartition(", ")[2]  # Windows names the maker last
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
