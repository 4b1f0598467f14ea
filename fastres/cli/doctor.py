"""`fastres doctor`: what is installed, what can run here, what is missing and how to get it."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastres import __version__, tuning
from fastres.block import current
from fastres.cli.environment import VARIABLES
from fastres.cli.output import as_json, heading, table
from fastres.kernels import BACKENDS, load_extensions
from fastres.kernels.cuda.archs import covering

#: Distributions whose versions a bug report needs.
DISTRIBUTIONS = ("torch", "triton", "torchvision", "timm", "transformers", "numpy")

#: Compiled modules, what they are for, and how to get one that is missing.
MODULES = {
    "fastres._cpu": (
        "the C++ kernels",
        (
            "install a C++20 compiler (g++ 11 or clang++ 14, or newer), then reinstall fastres "
            "from source with FASTRES_CPU=1, which shows why a build fails"
        ),
    ),
    "fastres._cuda": (
        "the CUDA C++ kernels",
        (
            "on Linux, install the CUDA toolkit (nvcc) 12 or newer, then reinstall fastres from "
            "source with FASTRES_CUDA=1, which shows why a build fails"
        ),
    ),
}

#: What `fastres.use_...` chooses.
_CHOICES = ("backend", "memory", "level")


def main(arguments: Sequence[str]) -> int:
    """Print the facts as text, or as one JSON object with --json."""
    parser = argparse.ArgumentParser(prog="fastres doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args(arguments)
    facts = collect()
    as_json(facts) if args.json else _show(facts)
    return 0


def collect() -> dict[str, Any]:
    """Everything `doctor` knows, as plain data."""
    extensions = _extensions()  # first: they may bring backends
    gpu = _gpu()
    return {
        "versions": _versions(),
        "modules": [_module(name) for name in MODULES],
        "extensions": extensions,
        "backends": [_backend(name) for name in BACKENDS],
        "settings": _settings(),
        "cpu": _cpu(),
        "gpu": gpu,
        "cuda": _cuda(gpu["devices"]),
        "autotuner": _autotuner(),
        "environment": [
            {"name": v.name, "value": v.value, "default": v.default, "meaning": v.meaning}
            for v in VARIABLES
        ],
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "fastres": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _module(name: str) -> dict[str, Any]:
    purpose, remedy = MODULES[name]
    facts: dict[str, Any] = {"name": name, "purpose": purpose, "present": True}
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        facts |= {"present": False, "why_not": "it was not built", "remedy": remedy}
    except ImportError as error:
        facts |= {"present": False, "why_not": str(error), "remedy": remedy}
    return facts


def _extensions() -> list[dict[str, Any]]:
    try:
        return [extension._asdict() for extension in load_extensions()]
    except ValueError as error:
        return [{"name": "-", "module": None, "error": str(error)}]


def _backend(name: str) -> dict[str, Any]:
    backend = BACKENDS[name]
    reason = backend.why_not()
    return {
        "name": name,
        "devices": list(backend.devices),
        "available": reason is None,
        "why_not": reason,
    }


def _settings() -> dict[str, str | None]:
    try:
        settings = current()
    except (ValueError, RuntimeError) as error:
        return {"backend": None, "memory": None, "error": str(error)}
    return {**{name: getattr(settings, name) for name in _CHOICES}, "error": None}


def _cpu() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "isa": None,
        "isas": [],
        "openmp": None,
        "openmp_shared_with_torch": None,
    }
    try:
        kernels: Any = importlib.import_module("fastres._cpu")
    except ImportError:
        return facts
    library = kernels.openmp()["library"]
    return facts | {
        "isa": kernels.isa(),
        "isas": list(kernels.isas()),
        "openmp": library,
        "openmp_shared_with_torch": _shared(library),
    }


def _shared(library: str | None) -> bool | None:
    """Whether our OpenMP runtime is the only one in this process, that is, torch's too.

    Two runtimes would each start a pool of threads. None where the system does not say what is
    loaded.
    """
    maps = Path("/proc/self/maps")
    if library is None or not maps.exists():
        return None
    names = re.findall(r"/\S*/lib(?:gomp|iomp5|omp)\b\S*", maps.read_text())
    return {Path(name).resolve() for name in names} == {Path(library).resolve()}


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "torch sees no GPU" if built else "this torch was built without GPU support"
        return {"devices": [], "why_not": reason}
    count = torch.cuda.device_count()
    found = [torch.cuda.get_device_properties(i) for i in range(count)]
    devices = [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory}
        for p in found
    ]
    return {"devices": devices, "why_not": None}


def _cuda(devices: list[dict[str, Any]]) -> dict[str, Any]:
    """What the CUDA kernels were built for and by; and for each GPU, what of it runs there."""
    try:
        kernels: Any = importlib.import_module("fastres._cuda")
    except ImportError:
        return {"archs": None, "toolkit": None, "devices": [None for _ in devices]}
    archs = kernels.archs()
    capabilities = [tuple(map(int, d["capability"].split("."))) for d in devices]
    runs = [covering(archs, (major, minor)) for major, minor in capabilities]
    return {"archs": archs, "toolkit": kernels.toolkit(), "devices": runs}


def _autotuner() -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        reason = tuning.why_not_measure(device)
    except ValueError as error:
        reason = str(error)
    return {
        "on": reason is None,
        "why_not": reason,
        "file": str(tuning.cache_file(device)),
        "kept": len(tuning.kept(device)),
        "shipped": len(tuning.shipped(device)),
    }


# ---------------------------------------------------------------- text


def _show(facts: dict[str, Any]) -> None:
    heading("Versions")
    table([(name, value or "not installed") for name, value in facts["versions"].items()])
    heading("Compiled modules")
    table([(m["name"], m["purpose"], _presence(m)) for m in facts["modules"]])
    heading("Backends")
    table([(b["name"], ", ".join(b["devices"]), _availability(b)) for b in facts["backends"]])
    _show_settings(facts["settings"])
    heading("Extensions")
    table(_extension_rows(facts["extensions"]))
    heading("CPU")
    table(_cpu_rows(facts["cpu"]))
    heading("GPU")
    gpus = [(d["name"], f"{d['memory'] / 2**30:.0f} GiB") for d in facts["gpu"]["devices"]]
    table(gpus or [("none", facts["gpu"]["why_not"])])
    heading("CUDA kernels")
    table(_cuda_rows(facts["cuda"], facts["gpu"]["devices"]))
    heading("Autotuner")
    table(_autotuner_rows(facts["autotuner"]))
    heading("Environment variables")
    table([(e["name"], _setting(e), e["meaning"]) for e in facts["environment"]])
    print(f"\nPython: {sys.executable}")


def _presence(module: dict[str, Any]) -> str:
    if module["present"]:
        return "present"
    return f"missing: {module['why_not']}. To get it: {module['remedy']}."


def _availability(backend: dict[str, Any]) -> str:
    return "available" if backend["available"] else f"not available: {backend['why_not']}"


def _setting(entry: dict[str, Any]) -> str:
    return f"= {entry['value']}" if entry["value"] is not None else f"not set ({entry['default']})"


def _show_settings(settings: dict[str, str | None]) -> None:
    if settings["error"] is None:
        print("  In force: " + ", ".join(f"{k} {settings[k]}" for k in _CHOICES) + ".")
    else:
        print(f"  The environment asks for what cannot be: {settings['error']}.")


def _cpu_rows(cpu: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("threads", str(cpu["threads"])), ("torch's kernels", cpu["torch_capability"])]
    if cpu["isa"] is not None:
        sharing = {True: "shared with torch", False: "beside torch's own", None: "not known"}
        rows += [
            ("fastres kernels", f"{cpu['isa']} (built and running here: {', '.join(cpu['isas'])})"),
            ("OpenMP", f"{cpu['openmp'] or 'none: one thread'}"),
            ("OpenMP runtime", sharing[cpu["openmp_shared_with_torch"]]),
        ]
    return rows


def _cuda_rows(cuda: dict[str, Any], devices: list[dict[str, Any]]) -> list[tuple[str, str]]:
    if cuda["archs"] is None:
        return [("none", "fastres._cuda is missing, see Compiled modules")]
    rows = [("built for", cuda["archs"]), ("by nvcc", cuda["toolkit"])]
    for device, runs in zip(devices, cuda["devices"], strict=True):
        number = device["capability"].replace(".", "")
        missing = f"not covered; reinstall fastres from source with FASTRES_CUDA_ARCHS={number}"
        rows.append((device["name"], f"runs {runs}" if runs else missing))
    return rows


def _extension_rows(extensions: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    if not extensions:
        return [("none", "no installed package names one, or FASTRES_EXTENSIONS=0")]
    return [(e["name"], e["module"] or "-", e["error"] or "imported") for e in extensions]


def _autotuner_rows(autotuner: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("measures", "yes" if autotuner["on"] else f"no: {autotuner['why_not']}"),
        ("cache file", autotuner["file"]),
        ("choices kept", str(autotuner["kept"])),
        ("choices shipped", str(autotuner["shipped"])),
    ]
