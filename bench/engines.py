"""Other people's inference engines: a stock network as ONNX, run by ONNX Runtime or OpenVINO.

A network is exported once for each size of its input, by a process of its own, so that no
contender's memory has the exporter in it. Every engine reads that file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastres.cli.libraries import library

from .interleave import Worker
from .results import slug

if TYPE_CHECKING:
    from .contenders import Job

#: A network: numpy's float32 [N, C, H, W] of the size that was exported -> its first output.
Call = Callable[[Any], Any]


class EngineError(RuntimeError):
    """An engine does not take a network, which says nothing about its numbers."""


class Engine(nn.Module):
    """A network that an engine runs, called like any module, for inference on a CPU.

    Args:
        call: the network.
    """

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    def forward(self, x: Tensor) -> Tensor:
        """float32 [N, C, H, W], contiguous -> the network's first output."""
        return torch.from_numpy(self._call(x.numpy()))


def loaded(job: Job) -> Engine:
    """A job's stock network in the engine that is its contender, on as many threads as torch has.

    Raises:
        EngineError: where the network cannot be exported, or the engine does not load it.
    """
    assert job.who.engine is not None
    network = exported(job)
    try:
        return Engine(job.who.engine(network, torch.get_num_threads()))
    except Exception as error:  # each engine has classes of its own for it
        raise EngineError(f"{job.plain} does not load it: {error}") from error


# ---------------------------------------------------------------- ONNX


def exported(job: Job) -> Path:
    """The file of a job's stock network in the folder `job.exports`, made where it is missing.

    Raises:
        EngineError: where the network cannot be exported.
    """
    path = Path(job.exports) / f"{slug(f'{job.name} {job.batch} {job.size}')}.onnx"
    if not path.exists():
        try:
            with Worker() as worker:
                worker.ask(what="export", job=asdict(job), path=str(path))
        except Exception as error:
            raise EngineError(f"the export to ONNX failed: {error}") from error
    return path


def export(job: Job, path: str) -> None:
    """Write a job's stock network, in its mode and for its size of input; the opset is torch's."""
    network, x = job.stock(), job.place(job.subject.input(0))
    program = torch.onnx.export(network, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)


# ---------------------------------------------------------------- engines


def onnx_runtime(network: Path, threads: int) -> Call:
    """ONNX Runtime, with all its graph optimisations."""
    ort = library("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Else its threads go on waiting busily for 35 ms after a step, while others are timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(str(network), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def openvino(network: Path, threads: int) -> Call:
    """OpenVINO, for one batch after the other, in float32 also where the CPU has bfloat16."""
    settings = {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    compiled = library("openvino").Core().compile_model(str(network), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda x: request.infer({0: x}, share_inputs=True)[0]
