"""What a result has to carry to be read later: machine, versions, commit."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastres

ROOT = Path(__file__).resolve().parent


def conditions(device: str = "cpu", packages: Iterable[str] = ()) -> dict[str, Any]:
    """Date, machine, versions and commit of a run on a torch device.

    `packages` are distributions, besides torch and triton, that took part.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        **({} if device == "cpu" else {"gpu": torch.cuda.get_device_name(device)}),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **({} if device == "cpu" else {"triton": _version("triton")}),
        **{package: _version(package) for package in packages},
        "fastres": fastres.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def stamp(found: dict[str, Any]) -> str:
    """The date of a run as the start of a file's name."""
    return str(found["date"])[:19].replace(":", "")


def _cpu_name() -> str:
    listed = Path("/proc/cpuinfo")
    for line in listed.read_text().splitlines() if listed.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Of the checkout; empty for an installed package."""
    if not (ROOT.parent / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    except FileNotFoundError:
        return ""  # without git
    return done.stdout.strip()
