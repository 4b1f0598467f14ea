"""`fastres explain MODEL`: which blocks are fused and how, and why the others are not."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import fastres
from fastres.cli import zoo
from fastres.cli.errors import CommandError
from fastres.cli.output import as_json
from fastres.kernels import BACKENDS

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def main(arguments: Sequence[str]) -> int:
    """Build the model with random weights, convert it, and print the report."""
    args = _parser().parse_args(arguments)
    model = zoo.load(args.model)
    fastres.convert(model)
    try:
        report = fastres.explain(
            model,
            device=args.device,
            dtype=DTYPES[args.dtype],
            channels_last=args.channels_last,
            backend=args.backend,
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise CommandError(str(error)) from error
    if args.json:
        as_json(report.to_dict())
    else:
        print(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastres explain",
        description="Which blocks of a model are fused and how, and why the others are not.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a name of fastres, torchvision or timm (resnet50d), a configuration of transformers "
        "(ResNetConfig), LIBRARY:NAME, transformers:PATH of a local model, or "
        "package.module:callable",
    )
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else None,
        help="where the model is to run (default: a GPU where there is one, or what the backend "
        "needs); without such a device, what would run on one",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="layout of the activations (default: channels_last)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser
