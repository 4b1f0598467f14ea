"""What a call of a primitive has to move and to compute: the roofline beside a measured time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastres.testing import Call, Case


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(part)


def bytes_of(primitive: str, call: Call, result: Any) -> int:
    """Bytes that a call cannot but move: what it needs to read, and what it returns, once each."""
    unread = set()
    if primitive == "bn_act_backward_apply":
        _, gate, branches, _, count = call.args
        wanted = call.kwargs["want_grads"]
        for index, branch in enumerate(branches):
            needed = (count and wanted[index]) or (index == 0 and gate.kind == "affine")
            if not needed:
                unread.add(branch.y.data_ptr())
    moved = {t.data_ptr(): t.numel() * t.element_size() for t in _leaves((call.args, call.kwargs))}
    written = sum(t.numel() * t.element_size() for t in _leaves(result))
    return written + sum(size for pointer, size in moved.items() if pointer not in unread)


def flops_of(primitive: str, call: Call, case: Case) -> int:
    """Multiplications and additions of the convolutions in a call."""
    if not primitive.startswith("conv_") or case.conv is None:
        return 0
    k, c, kh, kw = case.weight_shape
    h, w = case.conv.output_size(case.shape[2:], case.kernel)
    one = 2 * case.shape[0] * h * w * k * c * kh * kw
    if primitive != "conv_backward":
        return one
    return one * (call.kwargs["want_x"] + call.kwargs["want_weight"])
