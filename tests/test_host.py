"""How many Python functions a block enters per call: what its host time is made of, but exact."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils import _python_dispatch

pytest.importorskip("fastres.bench", reason="fastres is not installed, or before it had a bench")
pytest.importorskip("fastres._cpu", reason="counted on the kernels of the cpu backend")

from fastres.bench.host import blocks, main, measure_gpu_path, python_calls, thunks

#: What a bottleneck enters on the CPU, torch's own functions included. Backward is the difference.
LIMITS = {"forward": 52, "forward + backward": 112, "inference": 44}


@pytest.fixture
def _one_thread(monkeypatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # A dispatch mode that was used before may leave its flag behind, and costs a look at the modes.
    monkeypatch.setattr(_python_dispatch, "_is_in_non_infra_torch_dispatch_mode", False)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("what", LIMITS)
def test_a_block_enters_few_python_functions(what: str) -> None:
    found = python_calls(thunks(blocks()["fastres"])[what])
    assert found <= LIMITS[what]


def test_what_was_found_out_is_found_out_once() -> None:
    """The second call enters far fewer functions than the first, which matches and plans."""
    run = thunks(blocks()["fastres"])["forward"]
    entered, later = python_calls(run, warm_up=0), python_calls(run)
    assert entered > 1.5 * later


def test_the_command_prints_both(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("fastres.bench.host.ROUNDS", 1)
    monkeypatch.setattr("fastres.bench.host.CALLS", 2)
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("eager", "fastres", "forward + backward", "inference"))
    assert "on a GPU's path" in out


#: What it enters on the path that GPUs take, the stubs of convolutions and launches included.
GPU_LIMITS = {"forward": 53, "forward + backward": 103, "inference": 46}


def test_a_block_enters_no_more_python_functions_on_a_gpu_s_path() -> None:
    found = measure_gpu_path(1, 1)
    assert found.keys() == GPU_LIMITS.keys()
    for what, limit in GPU_LIMITS.items():
        assert found[what]["calls"] <= limit
        assert len(found[what]["us"]) == 1 and found[what]["us"][0] > 0
