"""Model surgery: existing networks run fused, in place and reversibly."""

from fastres.convert.core import convert, explain, revert
from fastres.convert.report import Report, Row
from fastres.convert.swaps import register_block

__all__ = ["Report", "Row", "convert", "explain", "register_block", "revert"]
