"""Models by name: fastres' own, torchvision's, timm's and transformers', and anybody's."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastres.cli.errors import CommandError
from fastres.cli.libraries import library


def load(name: str) -> nn.Module:
    """Build a model, with random weights and without any download.

    Args:
        name: "resnet50": a model of `fastres.models`, torchvision or timm, the first that has it,
            or a configuration class of transformers ("ResNetConfig"); "torchvision:resnet50",
            "timm:resnet50d", "transformers:ResNetConfig", "transformers:PATH" (a local model
            folder or config.json); or "package.module:callable" for what builds one.

    Raises:
        CommandError: for a name that is not known, or a library that is not there.
    """
    source, _, model = name.partition(":")
    if ":" not in name:
        return _by_name(name)
    if source in _LOADERS:
        return _LOADERS[source](model)
    return _by_callable(source, model)


def _by_name(name: str) -> nn.Module:
    if name in _own_names():
        return _own(name)
    if name.endswith("Config"):
        return _transformers(name)
    known = list(_own_names())
    for package, names, load_from in (
        ("torchvision.models", "list_models", _torchvision),
        ("timm", "list_models", _timm),
    ):
        try:
            listed: Sequence[str] = getattr(library(package), names)()
        except CommandError:
            continue
        if name in listed:
            return load_from(name)
        known += listed
    near = ", ".join(difflib.get_close_matches(name, dict.fromkeys(known), 3, 0.6))
    raise CommandError(
        f"MODEL must be the name of a model of fastres, torchvision or timm, LIBRARY:NAME or "
        f"package.module:callable, got {name!r}" + (f"; the nearest are {near}" if near else "")
    )


def _by_callable(source: str, name: str) -> nn.Module:
    """What `source`.`name`() gives; modules of the working directory are found too."""
    if not source or not all(part.isidentifier() for part in [*source.split("."), name]):
        raise CommandError(f"MODEL must be a name, LIBRARY:NAME or package.module:callable, "
                           f"got '{source}:{name}'")  # fmt: skip
    sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(source), name)
        model = make()
    except Exception as error:  # Anybody's code.
        raise CommandError(
            f"{source}:{name} must build a model without arguments, got "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.pop(0)
    if not isinstance(model, nn.Module):
        raise CommandError(f"{source}:{name} must build a torch.nn.Module, got {type(model)}")
    return model.train()


def _own_names() -> Sequence[str]:
    from fastres import models

    return [m for m in models.__all__ if m[0].islower()]


def _own(name: str) -> nn.Module:
    from fastres import models

    return _built(getattr(models, name))


def _torchvision(name: str) -> nn.Module:
    models = library("torchvision.models")
    if name not in models.list_models():
        raise CommandError(f"torchvision:NAME must be a model of torchvision, got {name!r}")
    options: dict[str, Any] = {"weights": None}
    # Detectors and segmentation networks fetch those of their backbone by default.
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None
    return _built(models.get_model, name, **options)


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
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}
