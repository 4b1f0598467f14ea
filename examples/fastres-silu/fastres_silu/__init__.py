"""Batch norm with SiLU for fastres, in Triton: `silu.py` holds all of it."""
