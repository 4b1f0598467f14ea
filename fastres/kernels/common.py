"""What the backends' adapters share: the kernels' codes, addresses, and memory for masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastres.kernels.types import Branch, Gate, is_channels_last, mask_shape

#: `fastres::DType`, and what DLPack memory may hold besides.
DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.uint8: 4,
}
#: `fastres::Activation`: what the compiled kernels know.
ACT_CODES = {
    "none": 0,
    "relu": 1,
    "relu6": 2,
    "silu": 3,
    "gelu": 4,
    "gelu_tanh": 5,
    "leaky_relu": 6,
    "hardswish": 7,
}
#: `fastres::Gate`, and `arithmetic.GATE_*` of Triton's kernels.
GATE_CODES = {"none": 0, "mask": 1, "affine": 2, "out": 3}


def gate_code(gate: Gate) -> int:
    """The kernels' constant for a gate; one without an activation stands open."""
    kind = "none" if gate.act == "none" and gate.kind != "mask" else gate.kind
    return GATE_CODES[kind]


def gate_act_code(gate: Gate) -> int:
    """The compiled kernels' constant for the activation whose derivative a gate applies."""
    return ACT_CODES[gate.applied]


def as_relu(gate: Gate) -> Gate:
    """ReLU6's gate by its output as ReLU's, by a pass that closes it from 6 on."""
    if gate.kind != "out" or gate.act != "relu6" or gate.tensor is None:
        return gate
    return Gate("out", gate.tensor.where(gate.tensor < 6, 0), "relu")


def new_mask(t: Tensor) -> Tensor:
    """Memory for the packed mask of an activation."""
    shape = mask_shape(t.shape, is_channels_last(t))
    return torch.empty(shape, dtype=torch.uint8, device=t.device)


def floats(*shape: int, device: torch.device) -> Tensor:
    """Memory for per-channel values: float32, whatever torch's default is."""
    return torch.empty(shape, dtype=torch.float32, device=device)


def zeros(*shape: int, device: torch.device) -> Tensor:
    """Zeros of that kind."""
    return floats(*shape, device=device).zero_()


def address(t: Tensor | None) -> int:
    """Where a tensor's first element is; 0 for none."""
    return 0 if t is None else t.data_ptr()


def bytes_of(t: Tensor) -> int:
    """Bytes from the first element to the last."""
    if t.numel() == 0:
        return 0
    reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (reach + 1) * t.element_size()


def overlap(memories: Sequence[tuple[int, int]]) -> bool:
    """Whether some of (address, bytes) share memory."""
    return any(a + size > b for (a, size), (b, _) in pairwise(sorted(memories)) if size)


def branch_tensors(
    branches: Sequence[Branch],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(y1, stats1, y2, stats2), with None for a branch that there is not."""
    y1, stats1 = branches[0] if branches else (None, None)
    y2, stats2 = branches[1] if len(branches) > 1 else (None, None)
    return y1, stats1, y2, stats2


def precision_of(dtype: torch.dtype) -> str:
    """ "tf32" or "ieee": float32 products follow torch's own switch for convolutions.

    ROCm's have no TF32.
    """
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if _allows_tf32() else "ieee"


def _allows_tf32() -> bool:
    """What torch's own convolutions would do, by the newer switch where there is one.

    Reading the older one raises where a user has set the newer.
    """
    for operator in ("conv", "all"):
        if (named := _precision_switch("cuda", operator)) != "none":
            return bool(named == "tf32")
    return bool(torch._C._get_cudnn_allow_tf32())


#: What `torch.backends.cudnn.conv.fp32_precision` and its like ask: every call of a block does.
_precision_switch: Callable[[str, str], str] = getattr(
    torch._C, "_get_fp32_precision_getter", lambda backend, operator: "none"
)
