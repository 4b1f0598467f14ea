"""The emulation itself: right kernels are right, each planted fault is reported as what it is."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import build  # isort: skip -- of this folder

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which(build.COMPILER), reason="needs g++ on Linux"
)

SOURCE = Path(__file__).with_name("kernels.cu")
SANITIZERS = ("address", "thread")

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def run() -> Run:
    """run(sanitizer, case, fault, **settings) of the emulation."""
    with ThreadPoolExecutor() as pool:
        built = pool.map(lambda s: build.build_program("kernels", [SOURCE], s), SANITIZERS)
    programs = dict(zip(SANITIZERS, built, strict=True))

    def call(sanitizer: str, case: str, fault: str = "", **settings: str) -> CompletedProcess[str]:
        return build.run_program(programs[sanitizer], case, fault, **settings)

    return call


def at(code: str) -> str:
    """Where a piece of code stands, as reports have it."""
    lines = [i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if code in line]
    assert len(lines) == 1, code
    return f"kernels.cu:{lines[0]}"


RESULTS = {
    "sum": ["sum 2016", "sum 6112", "sum 10208"],
    "copy": ["last 7"],
    # 0 + ... + 31 and the half warp's 0.5; then lane 10: of lane 9, the 4th of its 8, 31 - 10, any
    # and all, the odd lanes; then lane 0's neighbour
    "warp": ["value 496.5", *(f"value {v}" for v in (9, 11, 21, 1 + 4, 2863311530, 1))],
    "atomics": ["all 192", "sum 96"],
    "cooperate": ["total 6"] * 3,
    "pass": ["copied 256"],
    "shapes": ["launched 1"],
}


@pytest.mark.parametrize("case", RESULTS)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("seed", ["0", "1", "20"])
def test_right_kernels(run: Run, sanitizer: str, case: str, seed: str) -> None:
    done = run(sanitizer, case, SEED=seed)
    expected = RESULTS[case]
    assert done.stdout.splitlines()[-len(expected) :] == expected
    assert done.returncode == 0


SUM_BARRIER = at("__syncthreads();  // waited for")
SUM_KERNEL = r"kernel 'block_sum' <<<3, 64, 256>>>: block \d, thread \d+ "
SHUFFLE = at("sum += __shfl_down_sync(")
WARP_KERNEL = r"kernel 'warp_operations' <<<1, \d+, 128>>>: block 0, thread \d+ "
GRID_BARRIER = at("grid_barrier();")

#: What is not come to, launched wrongly or asked of a lane wrongly: whatever the sanitizer.
THROWN = {
    ("sum", "early exit"): SUM_KERNEL
    + rf"waits in __syncthreads\(\) at {SUM_BARRIER}, "
    + r"but block \d, thread 5 has left the kernel",
    ("sum", "two sites"): SUM_KERNEL
    + rf"waits in __syncthreads\(\) at {SUM_BARRIER}, but block \d, thread 3 "
    + rf"waits in __syncthreads\(\) at {at('__syncthreads();  // the other')} \(seed 0\)",
    ("small", ""): "shared_memory must fit into shared_bytes, got a type of 256",
    ("warp", "lane left"): WARP_KERNEL
    + rf"waits in __shfl_down_sync\(\) at {SHUFFLE}, but block 0, thread 7 has left the kernel",
    ("warp", "other operation"): WARP_KERNEL
    + rf"waits in __shfl_down_sync\(\) at {SHUFFLE}, but block 0, thread 7 "
    + rf"waits in __any_sync\(\) at {at('__any_sync(kAll, 1)')}",
    ("warp", "wrong mask"): WARP_KERNEL
    + rf"in __shfl_down_sync\(\) at {SHUFFLE}: the mask must name the",
    ("warp", "half a warp"): WARP_KERNEL
    + ".*but its mask names lanes that the block does not have",
    ("cooperate", "ordinary launch"): r"kernel 'two_phases' <<<3, 64, 0>>>: block \d, thread \d+ "
    + rf"calls grid_barrier\(\) at {GRID_BARRIER}, but the launch is not cooperative",
    ("cooperate", "too many blocks"): "blocks .* must be at most resident_blocks, got 5",
    ("shapes", "no blocks"): r"kernel 'nothing' <<<0, 32, 0>>>: blocks must be in .*, got 0",
    ("shapes", "2^31 blocks"): r"blocks must be in 1..2147483647, got 2147483648",
    ("shapes", "no threads"): "threads must be in 1..1024, got 0",
    ("shapes", "1025 threads"): "threads must be in 1..1024, got 1025",
    ("shapes", "100 KiB"): "shared_bytes must be at most 101376, got 102400",
    ("pass", "misaligned copy"): r"in copy_async\(\): both sides must begin at multiples of 16",
}


@pytest.mark.parametrize(("case", "fault"), THROWN)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_an_exception_names_the_fault(run: Run, sanitizer: str, case: str, fault: str) -> None:
    done = run(sanitizer, case, fault)
    assert re.search("error: .*" + THROWN[case, fault], done.stdout), done.stdout
    assert done.returncode == 1


#: What the sanitizers see: in the report's first line, and where.
SEEN = {
    ("address", "sum", "shared overrun"): ("heap-buffer-overflow", at("a.overrun ? 1 : 0")),
    ("address", "sum", "global overrun"): ("heap-buffer-overflow", at("a.overrun ? 1 : 0")),
    ("address", "copy", "misaligned load"): (
        "misaligned address .* requires 16 byte alignment",
        at("reinterpret_cast<const float4*>(a.in)[i]"),
    ),
    ("thread", "sum", "no barrier"): ("data race", at("scratch[thread] += ")),
    ("thread", "warp", "no syncwarp"): ("data race", at("neighbour = scratch[")),
    ("thread", "atomics", "not atomic"): ("data race", at("*a.plain += ")),
    ("thread", "cooperate", "no barrier"): ("data race", at("std::accumulate(")),
}


@pytest.mark.parametrize(("sanitizer", "case", "fault"), SEEN)
def test_a_sanitizer_sees_the_fault(run: Run, sanitizer: str, case: str, fault: str) -> None:
    done = run(sanitizer, case, fault)
    kind, place = SEEN[sanitizer, case, fault]
    assert re.search(kind, done.stdout), done.stdout
    assert place in done.stdout
    assert done.returncode != 0


def test_a_block_that_does_not_come_to_the_grids_barrier(run: Run) -> None:
    done = run("address", "cooperate", "absent block")
    assert f"waits in grid_barrier() at {GRID_BARRIER}, but block 1, thread" in done.stdout
    assert "has left the kernel" in done.stdout


def test_shared_memory_begins_as_nan(run: Run) -> None:
    for sanitizer in SANITIZERS:
        assert (
            re.findall(r"sum (.*)", run(sanitizer, "sum", "uninitialised").stdout) == ["-nan"] * 3
        )


@pytest.mark.parametrize("fault", ["no wait", "no commit", "slot in use"])
def test_copies_come_early_and_late(run: Run, fault: str) -> None:
    """Neither what was not waited for nor what a slot still held is found there by all threads."""
    done = run("address", "pass", fault)
    (right,) = re.findall(r"copied (\d+)", done.stdout)
    assert 0 < int(right) < 256


def test_the_seed_changes_who_comes_first(run: Run) -> None:
    """Without its barrier, what a block sums up depends on the order of its threads."""
    first = run("address", "cooperate", "no barrier", SEED="1").stdout
    assert run("address", "cooperate", "no barrier", SEED="1").stdout == first
    seeds = [str(seed) for seed in range(2, 8)]
    others = {run("address", "cooperate", "no barrier", SEED=seed).stdout for seed in seeds}
    assert others - {first}


def test_a_barrier_can_be_left_out_by_its_place(run: Run) -> None:
    """Which is how test_races.py shows that it would miss each of them."""
    assert "data race" in run("thread", "sum", OMIT=SUM_BARRIER).stdout
    assert "data race" in run("thread", "warp", OMIT=at("__syncwarp();")).stdout
    assert "data race" in run("thread", "cooperate", OMIT=GRID_BARRIER).stdout


def test_more_blocks_may_be_resident(run: Run) -> None:
    done = run("address", "cooperate", "too many blocks", RESIDENT="5")
    assert done.stdout.splitlines() == ["total 15"] * 5
