"""The roofline of a whole step: what its bytes and FLOPs take at the measured peaks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .contenders import Job
from .roofline import LEVELS, Layer, Operation, bound_ms, layers, operations

#: torch.compile fuses what stands around convolutions, as level b does; so do others and engines.
_FUSED_AROUND = "b"


@dataclass(frozen=True)
class Bounds:
    """Of one subject and mode; `layers` is None where its layers cannot be told."""

    machine: dict[str, float]
    layers: list[Layer] | None

    @classmethod
    def of(cls, job: Job, machine: dict[str, float]) -> Bounds:
        """Count what a job computes and moves."""
        subject = job.subject
        try:
            model = subject.build(fused=True)  # what can be fused is seen in fused blocks
            return cls(machine, layers(model, subject.pixels, image=not subject.part))
        except (ValueError, NotImplementedError):
            return cls(machine, None)  # no network of images, or one that meta tensors cannot run

    def of_contender(self, job: Job, level: str | None) -> dict[str, Any]:
        """flops, bytes and bound_ms of a contender's step, fused at a level."""
        if self.layers is None:
            return {}
        return self.sums(job, self.operations(job, level))

    def of_block(self, job: Job, level: str | None, name: str) -> float:
        """bound_ms of one block of the network."""
        inside = {layer.name for layer in self.layers or [] if layer.block == name}
        some = [one for one in self.operations(job, level) if one.layer in inside]
        return bound_ms(some, job.batch, **self.machine)

    @property
    def blocks(self) -> list[str]:
        """The names of the network's blocks that fastres fuses."""
        names = dict.fromkeys(layer.block for layer in self.layers or [] if layer.role != "chain")
        return [name for name in names if name]

    def operations(self, job: Job, level: str | None) -> list[Operation]:
        """What a contender's step cannot but do, per image."""
        listed = operations(
            self.layers or [], level_of(job, level), job.compute_dtype.itemsize,
            job.mode == "train", job.batch,
        )  # fmt: skip
        return [one for one in listed if one.flops] if job.who.bare else listed

    def sums(self, job: Job, some: Iterable[Operation]) -> dict[str, Any]:
        """The columns of a row that some operations come to."""
        kept = list(some)
        return {
            "flops": round(job.batch * sum(one.flops for one in kept)),
            "bytes": round(job.batch * sum(one.bytes for one in kept)),
            "bound_ms": bound_ms(kept, job.batch, **self.machine),
        }


def level_of(job: Job, level: str | None) -> str:
    """The level whose bytes are a contender's bound."""
    if job.who.fused:
        return level if level in LEVELS else _FUSED_AROUND
    return LEVELS[0] if job.who.stock else _FUSED_AROUND
