"""Process-wide choices: use_backend, use_memory and their environment variables."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastres import Bottleneck
from fastres.block import LEVELS, current, use_backend, use_level, use_memory


def test_choices_nest_and_end() -> None:
    before = current().backend, current().memory, current().level
    with use_backend("aten"), use_memory("lean"), use_level("b'"):
        with use_backend("reference"):
            assert (current().backend, current().memory) == ("reference", "lean")
            assert current().level == "b'"
        assert current().backend == "aten"
    assert (current().backend, current().memory, current().level) == before


def test_choices_end_with_an_exception() -> None:
    before = current().backend
    with pytest.raises(KeyError), use_backend("aten"):
        raise KeyError
    assert current().backend == before


def test_unknown_backend_lists_the_known() -> None:
    sentence = "backend must be one of auto, .*aten.*, got 'cudnn'"
    with pytest.raises(ValueError, match=sentence), use_backend("cudnn"):
        pass


def test_unknown_memory_mode_lists_the_known() -> None:
    sentence = "memory must be one of auto, speed, balanced, lean, got 'tiny'"
    with pytest.raises(ValueError, match=sentence), use_memory("tiny"):
        pass


def test_unknown_level_lists_the_known() -> None:
    sentence = "level must be one of auto, b, b', c', c, got 'd'"
    with pytest.raises(ValueError, match=sentence), use_level("d"):
        pass


def test_every_level_runs_and_backward_follows_its_own_forward() -> None:
    """Levels differ in speed; what they compute is the same but for rounding."""
    block = Bottleneck(16, 4)
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    grads = []
    for level in LEVELS:
        with use_level(level):
            out = block(x)
        grads.append(torch.autograd.grad(out.square().sum(), x)[0])
    for grad in grads[1:]:
        # Two float32 results, each a few hundred roundings of 2^-24 away from the truth.
        torch.testing.assert_close(grad, grads[0], rtol=2**-14, atol=2**-14)


def test_backend_that_cannot_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastres.kernels import BACKENDS, Backend

    broken = Backend("broken", ("cpu",), why_not=lambda: "no such accelerator")
    monkeypatch.setitem(BACKENDS, "broken", broken)
    sentence = "'broken' cannot run here: no such accelerator"
    with pytest.raises(RuntimeError, match=sentence), use_backend("broken"):
        pass


_PROGRAM = """
from fastres.block import current
print(current().backend, current().memory, current().level)
"""


def _run(**environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=env, capture_output=True, text=True, timeout=60
    )


def test_environment_chooses() -> None:
    done = _run(FASTRES_BACKEND="aten", FASTRES_MEMORY="lean", FASTRES_LEVEL="c'")
    assert done.stdout.split() == ["aten", "lean", "c'"], done.stderr


def test_wrong_environment_raises_when_a_block_runs_not_on_import() -> None:
    done = _run(FASTRES_BACKEND="cudnn")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: backend must be one of auto"), done.stderr
    assert "got 'cudnn'" in last
