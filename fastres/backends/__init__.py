"""One file per backend: each adapts the primitives to its kernels and registers them.

Importing this package registers every backend that can be imported; `BACKENDS` lists them all,
with the reason where one is not available.
"""

from fastres.backends import aten, cpu, cuda, reference, triton
from fastres.backends.base import BACKENDS, Backend, declare, preference

__all__ = [
    "BACKENDS",
    "Backend",
    "aten",
    "cpu",
    "cuda",
    "declare",
    "preference",
    "reference",
    "triton",
]
