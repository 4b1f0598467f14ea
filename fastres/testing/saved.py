"""What a forward pass keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that a forward pass saves for backward: each storage once, the module's own left out.

    Args:
        module: its parameters and buffers exist anyway and do not count.
        forward: calls the module with gradients enabled; its result may be anything.
    """
    tensors = (*module.parameters(), *module.buffers())
    permanent = {t.untyped_storage().data_ptr() for t in tensors}
    # The tensors are held, not only their addresses: a freed address would be used again.
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in permanent:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(t.untyped_storage().nbytes() for t in kept.values())
