"""The stages of a network: the run of similar blocks that holds most of it, and what is defined after them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from torch import nn

from bayesify.errors import ConversionError
from bayesify.graph.plan import join

_NUMBERED = re.compile(r"(.*?)\d+[a-z]?")
"""layer4, blocks.11, Mixed_7c"""


def stages(model: nn.Module) -> list[str]:
    """Names of the stages in the order of their definition; none where a network has no run of blocks.

    They are siblings that are numbered, ``layer1`` to ``layer4`` or ``blocks.0`` to ``blocks.11``: of all such groups
    the one with the most weights, the outermost of equals, and of those the last.
    """
    best: list[str] = []
    most = (0, 0)
    for owner, module in model.named_modules():
        groups: dict[str, list[str]] = {}
        for child, part in module.named_children():
            number = _NUMBERED.fullmatch(child)
            if number is not None and _weights(part):
                groups.setdefault(number.group(1), []).append(join(owner, child))
        for names in groups.values():
            size = (sum(_weights(model.get_submodule(name)) for name in names), -owner.count(".") - bool(owner))
            if len(names) > 1 and size >= most:
                best, most = names, size
    return best


def chosen_from(model: nn.Module, sites: str) -> Callable[[str], bool]:
    """Which sites a word or the name of a module selects, see `Rank1Config.sites`.

    Raises:
        ConversionError: there is no such module, or the network has no stages.
    """
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    if sites == "all":
        return lambda _: True
    if sites in ("last-stage", "head"):
        found = stages(model)
        own = [name for name, module in model.named_modules() if name and _weights(module, recurse=False)]
        if not found and sites == "head" and own:
            found = own  # the last layer
        if not found:
            raise ConversionError(
                f"sites={sites!r} needs a network with numbered blocks; found none in {type(model).__name__}. Give the "
                f"name of a module, from which on all have factors: one of {', '.join(list(order)[1:9])}."
            )
        last = found[-1]
        inside = [name for name in order if name == last or name.startswith(join(last, ""))]
        after = [name for name in order if order[name] > order[inside[-1]] and _weights(model.get_submodule(name))]
        start = last if sites == "last-stage" or not after else after[0]
    elif sites in order and sites:
        start = sites
    else:
        near = difflib.get_close_matches(sites, order, n=3, cutoff=0.0)
        raise ConversionError(
            f"sites={sites!r} is no module of {type(model).__name__}. Expected 'all', 'last-stage', 'head' or a name; "
            f"nearest: {', '.join(filter(None, near)) or 'none'}."
        )

    def chosen(site: str) -> bool:
        while site not in order:  # a parameter is where its module is
            site = site.rpartition(".")[0]
        return order[site] >= order[start]

    return chosen


def _weights(module: nn.Module, recurse: bool = True) -> int:
    """Elements of its matrices."""
    return sum(parameter.numel() for parameter in module.parameters(recurse) if parameter.dim() > 1)
