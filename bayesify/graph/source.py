"""What the code of a forward says of the weights that it reads, where no graph of it is to be had."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from operator import attrgetter
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

_NO_VALUES = {
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "size", "dim", "numel",
    "stride", "is_floating_point", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor",
}  # fmt: skip
"""What can be asked of a tensor without its values."""
_TESTS = {"isinstance", "hasattr"}
_LIKE = {"to", "type_as"}
"""Methods that only want to know the type and device of a tensor they are given."""
_ENUMERATIONS = {"children", "modules", "named_children", "named_modules", "_modules"}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def forward_names(module: nn.Module) -> set[str]:
    """Names that the code of `forward`, and of the methods it calls, mentions.

    A cheap test before an expensive one: a forward that cannot be traced and never names a parameter cannot read a
    weight behind its layer's back.
    """
    return set().union(*(_code_names(function.__code__) for function in _functions(module)))


def layers_read(module: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Those of the layers {path in the module: layer} with a weight that the forward of `module` may read by itself.

    `self.conv.weight` is one of the layer `conv`. Of `conv.weight`, where `conv` may be any other name for a layer,
    so are all whose path the code mentions.
    """
    names = forward_names(module)
    mentioned = {path for path in layers if names & _ENUMERATIONS or _is_mentioned(module, path, names)}
    found: set[str] = set()
    for function in _functions(module):
        reads = _reads(function)
        if reads is None:  # no source: anything that it names
            found |= {path for path in mentioned if any(_is_matrix(layers[path], name) for name in names)}
            continue
        for owner, name in reads:
            known = None if owner is None else _resolved(module, owner)
            if known is None:
                found |= {path for path in mentioned if _is_matrix(layers[path], name)}
            elif _is_matrix(known, name):
                found |= {path for path, layer in layers.items() if layer is known}
    return found


# ------------------------------------------------------------------------------------------------ the code


def _functions(module: nn.Module) -> Iterator[FunctionType]:
    """`forward`, and the methods and properties of the module that it mentions, and so on."""
    seen = {"forward"}
    pending = ["forward"]
    while pending:
        for function in _definitions(type(module), pending.pop()):
            yield function
            own = {n for n in _code_names(function.__code__) - seen if not hasattr(nn.Module, n)}
            seen |= own
            pending.extend(own)


def _definitions(cls: type[nn.Module], name: str) -> Iterator[FunctionType]:
    """The function of that name, and those of base classes as far as `super` leads to them."""
    for base in cls.__mro__:
        member = vars(base).get(name)
        if member is None:
            continue
        member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        function = inspect.unwrap(member) if callable(member) else None
        if not isinstance(function, FunctionType):
            return
        yield function
        if "super" not in _code_names(function.__code__):
            return


def _code_names(code: CodeType) -> set[str]:
    """Names of attributes and globals, and strings that could be such names."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _code_names(constant)
        elif isinstance(constant, str):
            names |= set(constant.split("."))
    return names


# ------------------------------------------------------------------------------------------------ what it reads


def _reads(function: FunctionType) -> list[tuple[str | None, str]] | None:
    """(owner, name) of every attribute whose value a function reads; the owner is `None` unless it is written as a
    path from `self`. `None` where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    itself = next(iter(function.__code__.co_varnames), "self")
    found = []
    for node in ast.walk(tree):
        attribute = _attribute(node)
        if attribute is not None and not _only_described(node, parents[node]):
            owner, name = attribute
            found.append((_path(owner, itself), name))
    return found


def _attribute(node: ast.AST) -> tuple[ast.expr, str] | None:
    """`owner.name`, also written as getattr(owner, "name")."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        return node.value, node.attr
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        match node.args:
            case [owner, ast.Constant(value=str(name)), *_]:
                return owner, name
    return None


def _path(owner: ast.expr, itself: str) -> str | None:
    """The path of an expression from the module, "" for the module."""
    if isinstance(owner, ast.Name):
        return "" if owner.id == itself else None
    attribute = _attribute(owner)
    outer = None if attribute is None else _path(attribute[0], itself)
    if attribute is None or outer is None:
        return None
    return f"{outer}.{attribute[1]}" if outer else attribute[1]


def _only_described(node: ast.AST, parent: ast.AST) -> bool:
    """Whether only the type, shape or presence of what an expression stands for matters."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in _NO_VALUES
    if isinstance(parent, ast.Compare):
        return all(isinstance(operation, (ast.Is, ast.IsNot)) for operation in parent.ops)
    if isinstance(parent, ast.Call):
        if isinstance(parent.func, ast.Attribute):
            return parent.func.attr in _LIKE
        return isinstance(parent.func, ast.Name) and parent.func.id in _TESTS
    return False


# ------------------------------------------------------------------------------------------------ the modules


def _resolved(module: nn.Module, path: str) -> Any:
    try:
        return attrgetter(path)(module) if path else module
    except Exception:
        return None  # set later, or a property that does not always have a value


def _is_matrix(owner: Any, name: str) -> bool:
    value = getattr(owner, name, None) if isinstance(owner, nn.Module) else None
    return isinstance(value, Tensor) and value.dim() > 1


def _is_mentioned(module: nn.Module, path: str, names: set[str]) -> bool:
    """Whether code names every step from a module to one beneath it; those through containers need no name."""
    for step in path.split("."):
        if not isinstance(module, _CONTAINERS) and step not in names:
            return False
        module = module.get_submodule(step)
    return True
