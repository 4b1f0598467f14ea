"""What is timed side by side: stock torch in layouts and compiled, others' kernels and engines,
and fastres.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fastres

from .baselines import with_cudnn, with_inplace_abn
from .engines import Call, loaded, onnx_runtime, openvino
from .models import Subject

#: What a contender's name ends in whose malloc keeps freed memory, `bench.interleave.KEEP`.
KEPT = ", kept"


@dataclass(frozen=True)
class Job:
    """Everything that decides what one step computes and how; sent to workers as JSON.

    `exports` is the folder where engines find networks as ONNX.
    """

    kind: str
    name: str
    batch: int
    size: int
    contender: str
    mode: str = "train"
    dtype: str = "float32"
    amp: bool = False
    channels_last: bool = True
    backend: str = "auto"
    memory: str = "auto"
    level: str = "auto"
    device: str = "cpu"
    exports: str = ""

    @property
    def subject(self) -> Subject:
        """The network or block."""
        return Subject(self.kind, self.name, self.batch, self.size)

    @property
    def plain(self) -> str:
        """The contender's name, wherever its memory comes from."""
        return self.contender.removesuffix(KEPT)

    @property
    def kept(self) -> bool:
        """Whether its malloc keeps freed memory."""
        return self.contender.endswith(KEPT)

    @property
    def who(self) -> Contender:
        """The contender, wherever its memory comes from."""
        return CONTENDERS[self.plain]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of activations: that of the parameters, or autocast's."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return torch.bfloat16 if self.amp and dtype == torch.float32 else dtype

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Of parameters and inputs."""
        return torch.float32 if self.amp else self.compute_dtype

    @property
    def nhwc(self) -> bool:
        """Whether activations are channels_last."""
        return self.channels_last if self.who.nhwc is None else self.who.nhwc

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of activations and weights."""
        return torch.channels_last if self.nhwc else torch.contiguous_format

    def place(self, t: Tensor) -> Tensor:
        """A batch on the device, in dtype and layout."""
        return t.to(self.device, self.parameter_dtype).contiguous(memory_format=self.memory_format)

    def stock(self) -> nn.Module:
        """The stock module, placed, in its mode."""
        return self._placed(self.subject.build(fused=False))

    def module(self) -> nn.Module:
        """The contender's module, placed, in its mode, and compiled where it is to be.

        Raises:
            EngineError: where it is an engine's, which does not take it.
        """
        if self.who.engine is not None:
            return loaded(self)
        module = self._placed(self.subject.build(self.who.fused))
        if self.who.change is not None:
            self.who.change(module)
        if self.who.compiled is not None:
            # Between the two on a GPU: everybody gets a CUDA graph of the whole step.
            graphs = self.who.compiled == "max-autotune" and self.device == "cuda"
            module.compile(mode=f"{self.who.compiled}{'-no-cudagraphs' if graphs else ''}")
        return module

    def _placed(self, module: nn.Module) -> nn.Module:
        module = module.to(self.device, self.parameter_dtype).to(memory_format=self.memory_format)  # type: ignore[call-overload]
        return module.train(self.mode == "train")

    @contextmanager
    def settings(self) -> Iterator[None]:
        """What the user chose for fastres is in force inside.

        Raises:
            ValueError: for a backend, memory mode or level that does not exist.
            RuntimeError: for a backend that cannot run here.
        """
        with ExitStack() as stack:
            stack.enter_context(fastres.use_backend(self.backend))
            stack.enter_context(fastres.use_memory(self.memory))
            stack.enter_context(fastres.use_level(self.level))
            yield

    def autocast(self) -> AbstractContextManager[object]:
        """Around a forward pass: autocast where it is asked for."""
        return torch.autocast(self.device, self.compute_dtype, enabled=self.amp)


@dataclass(frozen=True)
class Contender:
    """One way to run a subject.

    Attributes:
        meaning: for the help.
        nhwc: its layout; None follows --channels-last.
        fused: whether fastres runs it.
        compiled: torch.compile's mode, or None.
        change: what is done to a placed stock module.
        engine: (ONNX file of the stock network, threads) -> what runs it.
        bare: whether it runs the convolutions alone, which is no contender but a bound.
        kinds: the subjects it can run.
        packages: what has to be installed for it, by names of distributions that are modules too.
        why_not: why it cannot run a job, or None.
    """

    meaning: str
    nhwc: bool | None = None
    fused: bool = False
    compiled: str | None = None
    change: Callable[[nn.Module], None] | None = None
    engine: Callable[[Path, int], Call] | None = None
    bare: bool = False
    kinds: tuple[str, ...] = ("conv", "block", "model", "train")
    packages: tuple[str, ...] = ()
    why_not: Callable[[Job], str | None] = lambda job: None

    @property
    def stock(self) -> bool:
        """Whether it is stock torch itself, operator by operator."""
        return not (self.fused or self.compiled or self.change or self.engine)


def _no_compiler(job: Job) -> str | None:
    if job.device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler on a CPU, and there is none"
    if job.device == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on a GPU, which is not installed"
    return None


def _no_cudnn(job: Job) -> str | None:
    if job.device != "cuda":
        return "cuDNN runs on NVIDIA GPUs only"
    if job.mode == "train":
        return "torch exposes cuDNN's fused convolutions for inference only"
    return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"


def _no_engine(job: Job) -> str | None:
    if job.mode == "train":
        return "it runs inference only"
    if job.device != "cpu":
        return "it is compared on a CPU only"
    return "it is compared in float32 only" if job.amp or job.dtype != "float32" else None


#: What others' kernels fuse.
_WHOLE_BLOCKS = ("block", "model", "train")
#: What torch.onnx.export needs.
_EXPORTER = ("onnx", "onnxscript")

CONTENDERS = {
    "eager": Contender("stock torch, contiguous (NCHW)", nhwc=False),
    "channels_last": Contender("stock torch, channels_last (NHWC)", nhwc=True),
    "compile": Contender("torch.compile", compiled="default", why_not=_no_compiler),
    "compile-max-autotune": Contender(
        "torch.compile(mode='max-autotune')", compiled="max-autotune", why_not=_no_compiler
    ),
    "inplace_abn": Contender(
        "InPlaceABN with leaky ReLU for the blocks' inner norms", change=with_inplace_abn,
        kinds=_WHOLE_BLOCKS, packages=("inplace_abn",),
    ),
    "cudnn": Contender(
        "norms folded into cuDNN's convolution + add + ReLU, inference", change=with_cudnn,
        nhwc=True, kinds=_WHOLE_BLOCKS, why_not=_no_cudnn,
    ),
    "onnxruntime": Contender(
        "ONNX Runtime, inference of networks on a CPU", engine=onnx_runtime, nhwc=False,
        kinds=("model",), packages=("onnxruntime", *_EXPORTER), why_not=_no_engine,
    ),
    "openvino": Contender(
        "OpenVINO, inference of networks on a CPU", engine=openvino, nhwc=False,
        kinds=("model",), packages=("openvino", *_EXPORTER), why_not=_no_engine,
    ),
    "convolutions": Contender(
        "the convolutions alone: a bound", nhwc=True, bare=True, kinds=("conv", "block")
    ),
    "fastres": Contender("fused by fastres; always runs", fused=True),
}  # fmt: skip


def why_not(job: Job) -> str | None:
    """Why a job's contender cannot run its kind of subject in its way, or None."""
    if job.kind not in job.who.kinds:
        return f"it is for {', '.join(job.who.kinds)} only"
    if (reason := job.who.why_not(job)) is not None:
        return reason
    missing = [name for name in job.who.packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None
