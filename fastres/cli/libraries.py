"""Other people's libraries, imported when a command needs them."""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType

import torch

from fastres.cli.errors import CommandError

#: Keeps the operator schemas below alive: torch forgets a library that is collected.
_libraries: list[torch.library.Library] = []


def library(name: str, install: str | None = None) -> ModuleType:
    """Import a library that may be missing, or broken by a torch without its operators.

    A torchvision built for CUDA raises RuntimeError at import beside a CPU-only torch: it
    registers shape functions for operators that its own library failed to define. Their schemas
    are all it needs.

    Args:
        name: the module.
        install: the distribution that brings it, where that is not the package's own name.

    Raises:
        CommandError: where it cannot be imported, with the reason.
    """
    for _ in range(8):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            package = install or name.partition(".")[0]
            raise CommandError(
                f"{package} must be installed for this, got: {error}. "
                f"It comes with: pip install {package}"
            ) from error
        except RuntimeError as error:
            missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise CommandError(f"{name} must be importable for this, got: {error}") from error
            _define(missing.group(1))
            _forget("torchvision", name.partition(".")[0])
    raise CommandError(f"{name} must be importable for this, got: too many missing operators")


def _define(operator: str) -> None:
    """Give torch the schema of one of torchvision's operators; it still cannot run."""
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    fragment.define(
        f"{operator.partition('::')[2]}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
    _libraries.append(fragment)


def _forget(*packages: str) -> None:
    """Drop what a failed import left half made, so that the next attempt starts afresh."""
    for module in [m for m in sys.modules if m.partition(".")[0] in packages]:
        del sys.modules[module]
