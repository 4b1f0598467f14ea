"""Which of the architectures that `fastres._cuda` was built for runs on a GPU."""

from __future__ import annotations

import re


def covering(archs: str, capability: tuple[int, int]) -> str | None:
    """What of a build runs on a GPU: "sm_90a", "PTX of compute_100", or None.

    Machine code runs within its major version, from its own minor version on; with a letter it
    is for that version alone. PTX runs on everything newer (CUDA C++ Programming Guide, Binary
    and PTX Compatibility; `f`: Family-Specific Compiler Features).

    Args:
        archs: as `FASTRES_CUDA_ARCHS`, "80;90a;100+PTX".
        capability: (major, minor), as `torch.cuda.get_device_capability`.
    """
    usable = [
        m for m in map(re.compile(r"(\d+)(\d)([af]?)(\+PTX)?").fullmatch, archs.split(";")) if m
    ]
    newest = sorted(usable, key=lambda m: (int(m[1]), int(m[2]), m[3]), reverse=True)
    for match in newest:
        if _runs(match, capability):
            return f"sm_{match[1]}{match[2]}{match[3]}"
    for match in newest:
        built = (int(match[1]), int(match[2]))
        if match[4] and (_runs(match, capability) if match[3] else built <= capability):
            return f"PTX of compute_{match[1]}{match[2]}{match[3]}"
    return None


def _runs(match: re.Match[str], capability: tuple[int, int]) -> bool:
    major, minor = int(match[1]), int(match[2])
    if match[3] == "a":
        return (major, minor) == capability
    return major == capability[0] and minor <= capability[1]
