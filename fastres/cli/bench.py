"""`fastres bench`: the benchmark suite, which is a package of its own, `fastres.bench`."""

from __future__ import annotations

from fastres.bench.command import main

__all__ = ["main"]
