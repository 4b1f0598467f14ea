"""The `reference` backend: every primitive in float64, rounded only where it is stored."""

from __future__ import annotations

import torch

from fastres.backends.base import Backend, declare
from fastres.backends.formulas import CONVOLUTIONS, POINTWISE, register_formulas

declare(Backend("reference", ("cpu", "cuda", "meta"), why_not=lambda: None))
register_formulas("reference", (*POINTWISE, *CONVOLUTIONS), acc=lambda dtype: torch.float64)
