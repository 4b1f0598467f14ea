"""Triton kernels of fastres; installed as `fastres.triton_kernels`.

Each file holds one operation: its kernels, and the plain functions that choose launch shapes.
Nothing here knows about autograd or the registry; `fastres.kernels.triton` adapts the kernels.
"""
