"""Kernels compiled ahead of time, for GPUs that need not be there: registers, spills, memory.

Launches are recorded on meta tensors, exactly as a GPU of that size would get them, and compiled
by Triton for a compute capability; ptxas then says what the binary takes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from fastres import use_backend, use_level
from fastres.block import current, run_backward, run_forward, split_tensors
from fastres.kernels import Conv, Prologue
from fastres.kernels.triton import convolution, products
from fastres.kernels.triton.launch import Launch, options_of, recording
from fastres.kernels.triton.support import Device, pretending
from fastres.nn.fused import FusedParts
from fastres.nn.stem import FusedStem

#: Multiprocessors and shared memory of one program (CUDA C++ Programming Guide, table of compute
#: capabilities; product data sheets).
DEVICES = {
    80: Device(108, 163 << 10),  # A100
    90: Device(132, 227 << 10, True),  # H100, H200
    100: Device(148, 227 << 10, True, True),  # B200
}

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


class Resources(NamedTuple):
    """What a compiled kernel takes, and what its machine code holds.

    Attributes:
        registers: per thread.
        stack: bytes per thread; spilled registers lie there.
        local: bytes of local memory per thread.
        shared: bytes of shared memory per program.
        warps: warps per program.
        ptx: the assembly it was made from.
    """

    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    ptx: str


def resnet_launches(
    model: nn.Module,
    images: tuple[int, int],
    dtype: torch.dtype,
    device: Device,
    level: str,
    training: bool,
) -> list[Launch]:
    """The distinct launches of a ResNet of `fastres.models`, forward and in training backward.

    Args:
        model: the network; it is moved to the device "meta".
        images: batch size, and pixels per side.
        dtype: of activations and convolution weights; batch norms stay float32.
        device: what launch shapes depend on, say one of `DEVICES`.
        level: of fusion, as for `fastres.use_level`.
        training: with batch statistics and a backward; else inference.
    """
    model = model.to(device="meta", dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    model.train(training)
    number, size = images
    x = torch.empty(number, 3, size, size, dtype=dtype, device="meta")
    x = x.contiguous(memory_format=torch.channels_last)
    with (
        pretending(device),
        use_backend("triton"),
        use_level(level),
        recording() as launches,
    ):
        for module in model.modules():
            if isinstance(module, FusedParts):
                x = _run(module, x, training)
    return list(dict.fromkeys(launches))


def described_launches(dtype: torch.dtype, device: Device) -> list[Launch]:
    """The 1x1 convolutions of ResNet-50's first stage by tensor descriptors, in every form.

    The autotuner may take them; where nothing was measured nobody does.
    """
    with (
        pretending(device),
        recording() as launches,
        mock.patch.object(products, "tuned", _first_described),
    ):
        for channels, out_channels in ((64, 256), (256, 64)):
            x = torch.empty(256, channels, 56, 56, dtype=dtype, device="meta")
            x = x.contiguous(memory_format=torch.channels_last)
            weight = torch.empty(out_channels, channels, 1, 1, dtype=dtype, device="meta")
            stats = torch.empty(5, channels, device="meta")
            for prologue in (None, Prologue(stats, "relu")):
                convolution.conv_forward(
                    x, weight, None, Conv(), prologue=prologue, want_state=True
                )
    return [one for one in dict.fromkeys(launches) if one.kernel.__name__ == "conv1x1_fwd_kernel"]


def _first_described(
    name: str, module: str, sizes: object, candidates: list[Any], *_: object
) -> Any:
    return next((tile for tile in candidates if getattr(tile, "descriptors", False)), candidates[0])


def _run(module: FusedParts, x: Tensor, training: bool) -> Tensor:
    matched = module.matched()
    if matched is None:
        raise ValueError(f"model must be fused throughout, got one that is not: {module.why_not()}")
    settings = current()
    # torch pools behind the kernels.
    block = matched.block._replace(
        max_pool=None,
        save=training,
        memory="balanced",
        backend=settings.backend,
        level=settings.level,
    )
    units = split_tensors([t for layer in matched.layers for t in layer.tensors])
    out, *saved = run_forward(block, x, None, units)
    if training:
        parameters = [p is not None for layer in matched.layers for p in layer.parameters]
        # Images want no gradient.
        wants_x = not isinstance(module, FusedStem)
        run_backward(block, out, None, x, units, saved, [wants_x, False, *parameters])
    return nn.functional.max_pool2d(out, 3, 2, 1) if isinstance(module, FusedStem) else out


def compiled(launch: Launch, capability: int) -> Resources:
    """Compile what a launch needs for an NVIDIA GPU of a capability, and ask what it takes.

    Raises:
        Exception: of Triton's own classes, where it cannot be compiled.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile

    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    options |= options_of(launch.max_registers)
    target = GPUTarget("cuda", capability, 32)
    return _resources(compile(source_of(launch), target=target, options=options))


def source_of(launch: Launch) -> Any:
    """What `triton.compile` takes: a launch's kernel with its types, constants and alignments.

    They are what Triton's JIT finds: a number that is 1 is a constant, a multiple of 16 is known to
    be one, unless the kernel says that it does not specialise on it.
    """
    from triton.compiler import ASTSource

    names = list(launch.kernel.arg_names)
    general = {p.name for p in launch.kernel.params if p.do_not_specialize}
    constants = dict(launch.constants)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, (name, value) in enumerate(
        zip(names, (*launch.dtypes, *launch.sizes), strict=False)
    ):
        if value is None or (value == 1 and isinstance(value, int) and name not in general):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, tuple):
            dtype, block = value
            signature[name] = f"tensordesc<{_TYPES[dtype].removeprefix('*')}{list(block)}>"
        elif isinstance(value, torch.dtype):
            signature[name] = _TYPES[value]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else _integer(value)
            if isinstance(value, int) and value % 16 == 0 and name not in general:
                attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in names}
    return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)


def _integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _resources(binary: Any) -> Resources:
    """What cuobjdump, which comes with Triton, reads off a binary."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    # More warps than were asked for, where some are added to load.
    shared, warps = binary.metadata.shared, _threads(binary.asm["ptx"]) // 32
    return Resources(usage["REG"], usage["STACK"], usage["LOCAL"], shared, warps, binary.asm["ptx"])


def _threads(ptx: str) -> int:
    directive = re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx)
    assert directive is not None
    return int(directive[1])
