"""Models by name: fastres' own, torchvision's, timm's and transformers'."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fastres.cli.errors import CommandError
from fastres.cli.libraries import library


def load(name: str) -> nn.Module:
    """Build a model, with random weights and without any download.

    Args:
        name: a name of `fastres.models` ("resnet50"), or "torchvision:resnet50",
            "timm:resnet50d", "transformers:ResNetConfig" (a configuration class), or
            "transformers:PATH" (a local model folder or config.json).

    Raises:
        CommandError: for a name that is not known, or a library that is not there.
    """
    source, _, model = name.partition(":") if ":" in name else ("", "", name)
    if source not in _LOADERS or (":" in name and not source):
        raise CommandError(
            f"MODEL must be a name or LIBRARY:NAME with LIBRARY one of "
            f"{', '.join(filter(None, _LOADERS))}, got {name!r}"
        )
    return _LOADERS[source](model)


def _own(name: str) -> nn.Module:
    from fastres import models

    known = [m for m in models.__all__ if m[0].islower()]
    if name not in known:
        raise CommandError(f"MODEL must be one of {', '.join(known)}, got {name!r}")
    return _built(getattr(models, name))


def _torchvision(name: str) -> nn.Module:
    models = library("torchvision.models")
    if name not in models.list_models():
        raise CommandError(f"torchvision:NAME must be a model of torchvision, got {name!r}")
    return _built(models.get_model, name, weights=None)


def _timm(name: str) -> nn.Module:
    timm = library("timm")
    if not timm.is_model(name):
        raise CommandError(f"timm:NAME must be a model of timm, got {name!r}")
    return _built(timm.create_model, name, pretrained=False)


def _transformers(name: str) -> nn.Module:
    transformers = library("transformers")
    if importlib.util.find_spec("torchvision") is not None:
        library("torchvision")  # transformers imports it too, but does not survive a broken one
    if Path(name).exists():
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    elif name.endswith("Config") and hasattr(transformers, name):
        config = getattr(transformers, name)()
    else:
        raise CommandError(
            "transformers:NAME must be a configuration class such as ResNetConfig, or a local "
            f"folder or config.json, got {name!r}"
        )
    return _built(transformers.AutoModel.from_config, config)


def _built(build: Callable[..., Any], *args: Any, **kwargs: Any) -> nn.Module:
    model: nn.Module = build(*args, **kwargs)
    return model.train()


_LOADERS: dict[str, Callable[[str], nn.Module]] = {
    "": _own,
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}
