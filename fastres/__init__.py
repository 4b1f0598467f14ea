"""fastres: residual networks that train and infer faster in PyTorch, with the same numbers."""

from fastres import functional, models, nn
from fastres.block import use_backend, use_level, use_memory
from fastres.convert import convert, explain, register_block, revert
from fastres.nn import BasicBlock, Bottleneck

__version__ = "0.1.0"

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "__version__",
    "convert",
    "explain",
    "functional",
    "models",
    "nn",
    "register_block",
    "revert",
    "use_backend",
    "use_level",
    "use_memory",
]
