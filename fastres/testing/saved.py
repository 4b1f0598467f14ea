"""What a forward pass keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

#: How autograd's own nodes name what they saved.
_PREFIX = "_saved_"


def saved_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that a forward pass saves for backward: each storage once, the module's own left out.

    The graph is walked from the results: hooks on what is saved would change it, as a fused block
    does not share what it keeps with the block in front where hooks may move it elsewhere.

    Args:
        module: its parameters and buffers exist anyway and do not count.
        forward: calls the module with gradients enabled; the graph hangs on the tensors it returns.
    """
    tensors = (*module.parameters(), *module.buffers())
    permanent = {t.untyped_storage().data_ptr() for t in tensors}
    results = [t for t in tree_leaves(forward()) if isinstance(t, Tensor)]
    storages = [t.untyped_storage() for node in _nodes(results) for t in _saved_by(node)]
    sizes = {one.data_ptr(): one.nbytes() for one in storages}
    return sum([size for address, size in sizes.items() if address not in permanent])


def _nodes(results: list[Tensor]) -> list[Any]:
    """Every node of the graph behind the results."""
    found: dict[Any, None] = {}
    waiting = [t.grad_fn for t in results]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting += [following for following, _ in node.next_functions]
    return [*found]


def _saved_by(node: Any) -> Iterator[Tensor]:
    """The tensors that one node saved."""
    names = [name for name in dir(node) if name.startswith(_PREFIX)]
    values = [getattr(node, name) for name in names]
    yield from [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    yield from [t for t in getattr(node, "saved_tensors", ()) if t is not None]
