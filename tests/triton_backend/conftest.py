"""Triton's kernels run on a GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter is chosen when a kernel is defined, so for the whole process: `make test` runs this
folder twice, the second time with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run."""
    pytest.importorskip("triton")
    if INTERPRETED:
        _patch_once()
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU: run with TRITON_INTERPRET=1, as `make test` does")
    # cuDNN rounds to TF32 or does not as it sees fit for a shape; so that it is a measure of
    # error, neither side does.
    torch.backends.cudnn.allow_tf32 = False
    return "cuda"


def _patch_once() -> None:
    """Let the interpreter patch each of Triton's language modules once per launch.

    It does so again at every call of one kernel function by another, finds everything patched, and
    spends 40 % of these tests on it.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None or getattr(patch, "once", False):
        return
    language = interpreter.tl
    patched: set[frozenset[int]] = set()

    class Scope:
        def __init__(self, inner: object = None) -> None:
            self.inner = inner

        def restore(self) -> None:
            """Called at the end of a launch, whose scope is the first."""
            if self.inner is not None:
                self.inner.restore()
            patched.clear()

    def patch_once(function: object) -> object:
        modules = [
            m
            for m in (language, language.core)
            if any(m is v for v in function.__globals__.values())
        ]
        key = frozenset(map(id, modules))
        if key in patched:
            return Scope()
        patched.add(key)
        return Scope(patch(function))

    patch_once.once = True
    interpreter._patch_lang = patch_once
