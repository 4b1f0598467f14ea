"""The autotuner: measures what could run, takes the fastest, and keeps the answer on disk.

`choose` is all that a kernel or a plan needs. It knows nothing of kernels: candidates are plain
values, and the caller says how one is run. `machine` says where answers are kept, `store` keeps
them, `measure` times, and `choice` decides.
"""

from fastres.tuning.choice import choose, forget, why_not_measure
from fastres.tuning.machine import cache_file
from fastres.tuning.measure import Prepare
from fastres.tuning.store import Choice, Problem, export, kept, shipped

__all__ = [
    "Choice",
    "Prepare",
    "Problem",
    "cache_file",
    "choose",
    "export",
    "forget",
    "kept",
    "shipped",
    "why_not_measure",
]
