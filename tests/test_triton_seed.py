"""The residual addition's Triton kernels: in the interpreter, and compiled ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

#: TRITON_INTERPRET is read when a kernel is defined, so the interpreter needs a fresh process.
INTERPRETED = """
import torch, fastres, fastres.functional as F
ran = 0
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((2, 5, 3, 3), (1, 64, 7, 7), (3, 17, 1, 1), (2, 100, 2, 3), (2, 1, 5, 4)):
        for fmt in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(ran)
            x = torch.randn(shape).to(dtype).contiguous(memory_format=fmt)
            r = torch.randn(shape).to(dtype).contiguous(memory_format=fmt)
            x[0, 0, 0, 0], r[-1, -1, -1, -1] = float("nan"), float("inf")
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            with fastres.use_backend("triton"):
                out = F.add_relu(a, r)
            expected = torch.relu(b + r)
            grad = torch.randn_like(expected)
            out.backward(grad), expected.backward(grad)
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
            ran += 1
print("ran", ran)
"""


def test_interpreted_kernels_equal_torch_bit_for_bit() -> None:
    """One addition in float32 rounded once is what torch computes, so nothing may differ."""
    found = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.stdout.strip() == "ran 30", found.stderr[-2000:]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_compiles_ahead_of_time_with_wide_loads(capability: int, dtype: str) -> None:
    """Every load of activations is 16 bytes wide where rows are a multiple of that."""
    from fastres.triton_kernels.add_act import add_act_fwd_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature = {f"p_{n}": f"*{dtype}" for n in ("x", "residual", "out")}
    signature |= {"p_mask": "*u8", "rows": "i64", "cols": "i64", "row_bytes": "i64"}
    constants = {"RELU": True, "HAS_MASK": True, "BLOCK_ROWS": 4, "BLOCK_BYTES": 32}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        add_act_fwd_kernel,
        signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(7)},
    )
    ptx = compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    loads = [line for line in ptx.splitlines() if "ld.global" in line]
    assert loads and all(".v4." in line for line in loads), loads
