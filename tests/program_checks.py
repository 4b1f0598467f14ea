"""Steps of blocks whose kernels are written down, and of such that are walked."""

from __future__ import annotations

import copy

import pytest
import torch
from kinds import KINDS, Kind
from torch import Tensor, nn

from fastres.block import op
from fastres.block.programs import Programs
from fastres.nn import BasicBlock, Bottleneck
from fastres.nn.bound import _bound

CHANNELS_LAST = torch.channels_last

#: A gate is torch's own modules between two blocks, and factors are drawn anew at each call.
_WRITTEN = [k for k in KINDS if not k.random and not {"se", "eca"} & {*k.name.split("-")}]


def projected(stride: int = 2) -> nn.Module:
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, stride, bias=False), nn.BatchNorm2d(16))
    return Bottleneck(8, 4, stride=stride, downsample=shortcut)


BLOCKS = (
    Kind("basic", lambda: BasicBlock(8, 8)),
    Kind("bottleneck", lambda: Bottleneck(8, 2)),
    Kind("projected", projected),
    *_WRITTEN,
)


def walked(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing is written down."""
    monkeypatch.setattr(op, "recorder", lambda *_: None)


def programs_of(block: nn.Module) -> list[Programs]:
    """Those that a block has by now."""
    calls = _bound[block].calls
    return [call.run.programs for call in calls if call is not None and call.run.programs]


def lowered(block: nn.Module, dtype: torch.dtype, norms: torch.dtype) -> nn.Module:
    """The block in a dtype, and its batch norms in one of their own."""
    block = block.to(dtype)
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.to(norms)
    return block


F32, BF16 = torch.float32, torch.bfloat16
#: Of a block and of its batch norms.
DTYPES = {"float32": (F32, F32), "bfloat16": (BF16, BF16), "mixed": (BF16, F32)}


def history(
    block: nn.Module, last: bool, training: bool, device: str = "cpu", lower: bool = False
) -> list[Tensor]:
    """Outputs, gradients and buffers over three steps and inferences; `lower`: under autocast."""
    block = copy.deepcopy(block).train(training)
    dtype = next(p.dtype for p in block.parameters() if p.dim() == 4)
    kept: list[Tensor] = []
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(3, 8, 9, 6).to(device, dtype)
        x = x.contiguous(memory_format=CHANNELS_LAST) if last else x
        with torch.autocast(device, torch.bfloat16, enabled=lower):
            out = block(x.requires_grad_())
        out.backward(torch.randn_like(out))
        kept += [out.detach(), x.grad, *[p.grad for p in block.parameters()]]
        kept += [b.clone() for b in block.buffers()]
        with torch.no_grad():
            for p in block.parameters():
                p.sub_(p.grad, alpha=0.01)
        block.zero_grad()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=lower):
            kept.append(block.eval()(x.detach()))
        block.train(training)
    return kept


def check_same_bits(
    kind: Kind,
    dtypes: str,
    training: bool,
    last: bool,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    lower: bool = False,
) -> None:
    """A block whose kernels were written down has the walk's bits, by the backend in force."""
    torch.manual_seed(0)
    block = lowered(kind.make(), *DTYPES[dtypes]).to(device)
    if last:
        block = block.to(memory_format=CHANNELS_LAST)
    written = history(block, last, training, device, lower)
    walked(monkeypatch)
    expected = history(block, last, training, device, lower)
    for found, wanted in zip(written, expected, strict=True):
        assert torch.equal(found, wanted)


def check_written(kind: Kind, dtypes: str, device: str, lower: bool = False) -> None:
    """It has programs for forward and backward that call something, by the backend in force."""
    block = lowered(kind.make(), *DTYPES[dtypes]).to(device, memory_format=CHANNELS_LAST)
    x = torch.randn(2, 8, 5, 5).to(device, DTYPES[dtypes][0])
    x = x.contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    for _ in range(2):
        with torch.autocast(device, torch.bfloat16, enabled=lower):
            out = block(x)
        out.sum().backward()
    (written,) = programs_of(block)
    assert min(written.steps) > 1 and len(written.steps) == 2
