"""Model surgery: existing networks run fused, in place and reversibly."""

from fastres.convert.core import convert, explain, revert
from fastres.convert.report import Report, Row

__all__ = ["Report", "Row", "convert", "explain", "revert"]
