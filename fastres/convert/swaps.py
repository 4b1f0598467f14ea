"""Which class runs a module fused in place of its own: those of the zoos, and those declared.

Such a class bears the name of the one that it stands for, and is stored as that one, so that code
which goes by names, and files, know nothing of fastres.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from fastres.nn import blocks, stock
from fastres.nn.blocks import FusedModule
from fastres.nn.fused import run_fused
from fastres.nn.match import Decline, Parts

#: The module a zoo's models come from -> our file about it, imported once that module is.
ZOOS = {
    "torchvision.models.resnet": "fastres.convert.torchvision",
    "timm.models.resnet": "fastres.convert.timm",
    "timm.models.resnetv2": "fastres.convert.timm_v2",
    "transformers.models.resnet.modeling_resnet": "fastres.convert.transformers",
}

Swaps = dict[type, type]

_declared: Swaps = {}

#: Those of fastres itself. What was built of them is not reverted, unless that is asked for.
BUILT: Swaps = {
    stock.BasicBlock: blocks.BasicBlock,
    stock.Bottleneck: blocks.Bottleneck,
    stock.SEBasicBlock: blocks.SEBasicBlock,
    stock.SEBottleneck: blocks.SEBottleneck,
    stock.PreActBasicBlock: blocks.PreActBasicBlock,
    stock.PreActBottleneck: blocks.PreActBottleneck,
    stock.WideBasicBlock: blocks.WideBasicBlock,
}


def register_block(cls: type[nn.Module], describe: Callable[[Any], Parts | Decline]) -> None:
    """Declare what the modules of a class compute, for `convert` to run them fused.

    It is for a forward that cannot be traced, as one whose control flow depends on values; others
    need no declaration. Nobody checks that the two agree: `fastres.testing.check_block` does.

    Args:
        cls: the exact class. Its forward takes one tensor [N, C, H, W] and returns one; with other
            arguments it runs as it is.
        describe: gives for a module `fastres.nn.Parts`, the children in the order of their
            computation, or a `fastres.nn.Decline`, a reason to leave it as it is. It is called
            whenever a child may have changed, and must neither compute nor change anything.

    Raises:
        TypeError: for a class that is no module's, or a description that cannot be called.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a class of torch.nn.Modules, got {cls!r}")
    if not callable(describe):
        raise TypeError(f"describe must be a function, got {type(describe).__name__}")
    own: Any = cls

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        out = run_fused(self, given[0]) if len(given) == 1 else None
        return own.forward(self, *args, **kwargs) if out is None else out

    def parts(self: Any) -> Parts | Decline:
        found = describe(self)
        if not isinstance(found, Parts | Decline):
            raise TypeError(f"describe must return Parts or a Decline, got {type(found).__name__}")
        return found

    names = {"forward": forward, "_parts": parts}
    metaclass: Any = type(cls)
    fused = metaclass(cls.__name__, (FusedModule, cls), names)
    # What was decorated elsewhere is the user's own as it stands now.
    fused._stock, fused._stock_forward = cls, own.forward
    stand_for(fused, cls)
    _declared[cls] = fused


def swaps() -> Swaps:
    """Stock class -> fused class: those declared, of the zoos that are loaded, and of fastres."""
    loaded = [load(ours) for zoo, ours in ZOOS.items() if zoo in sys.modules]
    found = {
        stock: fused for one in loaded if isinstance(one, dict) for stock, fused in one.items()
    }
    return BUILT | found | _declared


def load(ours: str) -> Swaps | str:
    """The swaps of a zoo, or what is wrong with a version of it that we do not know."""
    try:
        found: Swaps = importlib.import_module(ours).SWAPS
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"{ours.rpartition('.')[2]} cannot be converted: {error}"
    for theirs, fused in found.items():
        stand_for(fused, theirs)
    return found


def stand_for(fused: Any, stock: Any) -> None:
    """Give a class the name of the one that it stands for, and store its modules as that one's."""
    if "_fastres_stock" in fused.__dict__:
        return
    fused._fastres_stock = stock
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(fused, name, getattr(stock, name))
    fused.__reduce_ex__ = _reduce_ex


def _reduce_ex(self: Any, protocol: Any) -> Any:
    return stored(self, self._fastres_stock.__reduce_ex__(self, protocol), _restore)


def stored(module: nn.Module, reduced: Any, restore: Callable[..., Any]) -> Any:
    """What a module's class gave to be stored, with the stock class in place of one of ours.

    Args:
        reduced: what `__reduce_ex__` of the stock class returned.
        restore: called instead of its function, which it is given first.
    """
    if isinstance(reduced, str):
        return reduced
    make, args, *rest = reduced
    own = [arg._fastres_stock if stands(arg) else arg for arg in args]
    return (restore, (make, *own), *rest) if type(module) in args else reduced


def stands(value: Any) -> bool:
    """Whether it is a class of ours that stands for another one."""
    return isinstance(value, type) and value.__dict__.get("_fastres_stock") is not None


def _restore(make: Callable[..., Any], *args: Any) -> Any:
    """A module as pickle and deepcopy make it, of the class that runs it fused."""
    module = make(*args)
    module.__class__ = swaps().get(type(module), type(module))
    return module
