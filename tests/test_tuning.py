"""The autotuner: what it measures, what it keeps, and what never breaks a step.

No GPU: a fake one says how long each candidate takes, and the files are in a temporary folder.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock

from fastres import tuning
from fastres.cli import doctor
from fastres.tuning import Choice, Problem, measure, store

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
PROBLEM = Problem("conv_fwd", (64, 56, "float16", True), "a1b2")
OTHER = Problem("other", ())


class FakeGpu:
    """Candidates are names; `times` says how many milliseconds each takes, or what it raises."""

    def __init__(self) -> None:
        self.times: dict[str, float | BaseException | Callable[[], float]] = {}
        self.prepared: list[str] = []
        self.launched: list[str] = []

    def run(self, candidate: str) -> Callable[[], object]:
        self.prepared.append(candidate)
        return lambda: candidate

    @contextmanager
    def timer(self, device: torch.device) -> Iterator[measure.Timer]:
        assert device.type == "cuda"
        yield self.milliseconds

    def milliseconds(self, thunk: measure.Thunk) -> float:
        name = str(thunk())
        self.launched.append(name)
        found = self.times[name]
        if isinstance(found, BaseException):
            raise found
        return found() if callable(found) else found

    def choose(
        self, names: Sequence[str] = "abc", problem: Problem = PROBLEM, device: Any = GPU
    ) -> str:
        return tuning.choose(problem, list(names), self.run, device=device)

    def choose_anew(self, names: Sequence[str] = "abc", **options: Any) -> tuple[str, list[str]]:
        """The choice, and what was measured for it."""
        self.prepared.clear()
        return self.choose(names, **options), list(self.prepared)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGpu]:
    """A GPU on which b is the fastest of a, b and c; empty folders for files and tables."""
    fake = FakeGpu()
    fake.times = {"a": 2.0, "b": 1.0, "c": 4.0}
    found = SimpleNamespace(name="Fake GPU (9000)", major=9, minor=0, L2_cache_size=1)
    (tmp_path / "tables").mkdir()
    monkeypatch.delenv("FASTRES_AUTOTUNE", raising=False)
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(measure, "gpu_timer", fake.timer)
    monkeypatch.setattr(store, "tables", lambda: tmp_path / "tables")
    tuning.forget()
    yield fake
    tuning.forget()


def ship(folder: Path, problem: Problem, name: str, device: str = "Fake GPU (9000)") -> Path:
    """Write the table of the fake GPU."""
    file = folder / "tables" / ("cpu.json" if device == "cpu" else "fake-gpu-9000.json")
    header: store.Header = {"format": store.FORMAT, "device": device}
    file.write_text(store.render(header, {problem: Choice(name, {name: 1.0})}))
    return file


def restart() -> None:
    """As a new process: only the files are left."""
    tuning.forget()


# ---------------------------------------------------------------- choosing


def test_the_fastest_is_taken_and_remembered(gpu: FakeGpu) -> None:
    assert gpu.choose_anew() == ("b", ["a", "b", "c"])
    assert gpu.choose_anew() == ("b", [])


def test_measuring_is_announced_once(gpu: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    gpu.choose()
    gpu.choose(problem=OTHER)
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "first step" in said and "FASTRES_AUTOTUNE=0" in said
    assert str(tuning.cache_file(GPU)) in said
    caplog.clear()
    gpu.choose_anew()
    assert not caplog.records, "what is known is taken in silence"


def test_the_file_answers_in_the_next_process(gpu: FakeGpu) -> None:
    gpu.choose()
    restart()
    gpu.times = {}
    assert gpu.choose_anew() == ("b", [])


def test_equal_gpus_share_their_choices(gpu: FakeGpu) -> None:
    gpu.choose()
    assert gpu.choose_anew(device=torch.device("cuda", 1)) == ("b", [])
    assert gpu.choose_anew(device=torch.device("cuda")) == ("b", [])


def test_no_candidate_is_an_error(gpu: FakeGpu) -> None:
    with pytest.raises(ValueError, match="candidates must hold at least one candidate, got none"):
        gpu.choose("")


def test_a_single_candidate_is_not_measured(gpu: FakeGpu) -> None:
    assert gpu.choose_anew("c") == ("c", [])
    assert gpu.choose_anew("c", device=CPU) == ("c", [])


@pytest.mark.parametrize(
    "other",
    [
        PROBLEM._replace(kernel="conv_bwd"),
        PROBLEM._replace(sizes=(64, 28, "float16", True)),
        PROBLEM._replace(source="c3d4"),
    ],
)
def test_another_problem_is_measured_anew(gpu: FakeGpu, other: Problem) -> None:
    gpu.choose()
    gpu.times["a"] = 0.5
    assert gpu.choose_anew(problem=other) == ("a", ["a", "b", "c"])
    assert gpu.choose() == "b"


def test_a_name_that_vanished_is_ignored(gpu: FakeGpu) -> None:
    gpu.choose()
    assert gpu.choose_anew("ac") == ("a", ["a", "c"])
    restart()
    gpu.times["d"] = 9.0
    assert gpu.choose_anew("cd") == ("c", ["c", "d"])


def test_a_choice_goes_by_name_not_by_place(gpu: FakeGpu) -> None:
    gpu.choose("abc")
    assert gpu.choose_anew("cab") == ("b", [])
    assert gpu.choose_anew("b") == ("b", [])
    restart()
    assert gpu.choose_anew("bca") == ("b", [])


def test_candidates_are_kept_under_the_name_given(gpu: FakeGpu) -> None:
    gpu.times = {"x": 2.0, "y": 1.0}
    found = tuning.choose(
        PROBLEM, [{"at": "x"}, {"at": "y"}], lambda c: lambda: c["at"],
        device=GPU, name=lambda c: f"tile-{c['at']}",
    )  # fmt: skip
    assert found == {"at": "y"}
    assert tuning.kept(GPU) == {PROBLEM: Choice("tile-y", {"tile-x": 2.0, "tile-y": 1.0})}


def test_names_must_differ(gpu: FakeGpu) -> None:
    with pytest.raises(ValueError, match="candidates must have different names, got 3"):
        gpu.choose("aba")


def test_sizes_must_be_plain(gpu: FakeGpu) -> None:
    problem = Problem("conv_fwd", (64, torch.float16))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"sizes must hold int, str or bool, got torch\.float16"):
        gpu.choose(problem=problem)


# ---------------------------------------------------------------- what may not be measured


def _switch_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRES_AUTOTUNE", "0")


def _be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)


@pytest.mark.parametrize("fix", [_switch_off, _be_deterministic])
def test_a_fixed_choice_depends_on_the_release_alone(
    gpu: FakeGpu,
    fix: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    gpu.choose()  # b, in memory and on disk
    with monkeypatch.context() as patch:
        fix(patch)
        tuning.choice._autotune.cache_clear()
        assert gpu.choose_anew() == ("a", [])
        restart()
        tuning.cache_file(GPU).write_text("broken")  # reading it would warn
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert gpu.choose_anew() == ("a", [])
        restart()
        ship(tmp_path, PROBLEM, "c")
        assert gpu.choose_anew() == ("c", [])
        assert gpu.choose_anew("ab") == ("a", [])


def test_why_not_measure_names_the_reason(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.why_not_measure(GPU) is None
    assert "the device is cpu" in str(tuning.why_not_measure(CPU))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in str(tuning.why_not_measure(GPU))
    _be_deterministic(monkeypatch)
    assert "use_deterministic_algorithms" in str(tuning.why_not_measure(GPU))
    _switch_off(monkeypatch)
    restart()
    assert tuning.why_not_measure(GPU) == "FASTRES_AUTOTUNE=0"


def test_a_wrong_switch_raises_when_something_is_chosen(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRES_AUTOTUNE", "maybe")
    restart()
    for _ in range(2):
        with pytest.raises(ValueError, match="FASTRES_AUTOTUNE must be 0 or 1, got 'maybe'"):
            gpu.choose()
    env = {**os.environ, "FASTRES_AUTOTUNE": "maybe"}
    subprocess.run([sys.executable, "-c", "import fastres.tuning"], env=env, check=True, timeout=60)


def test_a_cpu_takes_the_first_or_what_ships(gpu: FakeGpu, tmp_path: Path) -> None:
    assert gpu.choose_anew(device=CPU) == ("a", [])
    restart()
    ship(tmp_path, PROBLEM, "c", "cpu")
    assert gpu.choose_anew(device=CPU) == ("c", [])
    assert not (tmp_path / "cache").exists()


def test_a_capture_measures_nothing_but_knows_what_is_known(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert gpu.choose_anew() == ("a", [])
    assert gpu.choose_anew() == ("b", ["a", "b", "c"])  # the stand-in was not remembered
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert gpu.choose() == "b"
    restart()
    assert gpu.choose_anew() == ("b", [])


# ---------------------------------------------------------------- measuring


def test_candidates_take_turns_and_clearly_slower_ones_drop_out(gpu: FakeGpu) -> None:
    gpu.times = {"a": 1.1, "b": 1.0, "c": 1.6}
    assert gpu.choose() == "b"
    warm, first = measure.WARM_UPS * 3, measure.FIRST_ROUNDS * 3
    assert gpu.launched[:warm] == ["a"] * 2 + ["b"] * 2 + ["c"] * 2
    assert gpu.launched[warm : warm + first] == ["a", "b", "c"] * measure.FIRST_ROUNDS
    assert gpu.launched[warm + first :] == ["a", "b"] * (measure.ROUNDS - measure.FIRST_ROUNDS)
    assert gpu.prepared == ["a", "b", "c"]


def test_a_race_that_is_decided_ends(gpu: FakeGpu) -> None:
    gpu.times = {"a": 3.0, "b": 1.0, "c": 3.0}
    assert gpu.choose() == "b"
    assert gpu.launched.count("b") == measure.WARM_UPS + measure.FIRST_ROUNDS


def test_medians_decide_not_outliers_and_not_the_warm_up(gpu: FakeGpu) -> None:
    warm_up = [90.0] * measure.WARM_UPS
    steady = iter(warm_up + [1.0, 50.0, 1.0, 1.0] * measure.ROUNDS)
    lucky = iter(warm_up + [1.2, 0.1, 1.2, 1.2] * measure.ROUNDS)
    gpu.times = {"lucky": lambda: next(lucky), "steady": lambda: next(steady)}
    assert gpu.choose(["lucky", "steady"]) == "steady"
    assert tuning.kept(GPU)[PROBLEM].milliseconds == {"lucky": 1.2, "steady": 1.0}


def test_of_equal_candidates_the_heuristics_is_taken(gpu: FakeGpu) -> None:
    gpu.times = dict.fromkeys("abc", 1.0)
    assert gpu.choose() == "a"


class OutOfResourcesError(Exception):
    """As Triton's, which derives from nothing but Exception."""


@pytest.mark.parametrize(
    "error",
    [OutOfResourcesError("shared memory"), RuntimeError("no")],
)
def test_a_candidate_that_fails_is_skipped(
    gpu: FakeGpu, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def run(candidate: str) -> Callable[[], object]:
        if candidate == "c":
            raise error
        return gpu.run(candidate)

    caplog.set_level(logging.DEBUG, "fastres.tuning")
    gpu.times = {"a": 2.0, "b": error, "d": 1.0}
    assert tuning.choose(PROBLEM, list("abcd"), run, device=GPU) == "d"
    assert set(tuning.kept(GPU)[PROBLEM].milliseconds) == {"a", "d"}
    level = logging.DEBUG if "OutOfResources" in type(error).__name__ else logging.WARNING
    said = [r.getMessage() for r in caplog.records if r.levelno == level]
    skipped = [line for line in said if line.startswith("candidate")]
    assert [
        f"candidate {name} is skipped" in line for name, line in zip("bc", skipped, strict=True)
    ]
    assert all(f"{type(error).__name__}: {error}" in line for line in skipped)


def test_a_candidate_that_fails_later_is_skipped(gpu: FakeGpu) -> None:
    launches = iter([1.9] * (measure.WARM_UPS + 4))  # then StopIteration
    gpu.times = {"a": 2.0, "b": lambda: next(launches), "c": 2.1}
    assert gpu.choose() == "a"
    assert set(tuning.kept(GPU)[PROBLEM].milliseconds) == {"a", "c"}


def test_where_all_fail_the_first_is_taken_and_not_kept(gpu: FakeGpu) -> None:
    gpu.times = dict.fromkeys("abc", RuntimeError("no"))
    assert gpu.choose_anew() == ("a", ["a", "b", "c"])
    assert gpu.choose_anew() == ("a", [])  # not again in every step
    assert not tuning.cache_file(GPU).exists()
    restart()
    assert gpu.choose_anew() == ("a", ["a", "b", "c"])


def test_without_memory_to_measure_the_first_is_taken(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def full(device: torch.device) -> Iterator[measure.Timer]:
        raise torch.OutOfMemoryError
        yield

    monkeypatch.setattr(measure, "gpu_timer", full)
    assert gpu.choose() == "a"
    assert not tuning.cache_file(GPU).exists()


def test_a_candidate_without_memory_says_nothing_about_the_others(gpu: FakeGpu) -> None:
    """In the middle of a training step memory is short for all of them: nobody is kept."""
    gpu.times = {"a": 2.0, "b": 1.0, "c": torch.OutOfMemoryError("full")}
    assert gpu.choose() == "a"
    assert not tuning.cache_file(GPU).exists()


def test_an_interrupt_passes_and_leaves_nothing_behind(gpu: FakeGpu) -> None:
    gpu.times["b"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        gpu.choose()
    gpu.times["b"] = 1.0
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(gpu.choose()))
    thread.start()  # another thread would wait for ever for a lock that was not given back
    thread.join(10)
    assert found == ["b"]


def test_it_says_what_it_chose_to_the_log_alone(
    gpu: FakeGpu, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "fastres.tuning")
    gpu.choose()
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert said == [f"{PROBLEM}: b, 1.0000 ms"]
    assert capfd.readouterr() == ("", "")


def test_threads_measure_a_problem_once(gpu: FakeGpu) -> None:
    def slow() -> float:
        time.sleep(0.002)
        return 1.0

    gpu.times = {"a": slow, "b": slow}
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(gpu.choose("ab"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == ["a"] * 4
    assert gpu.prepared == ["a", "b"]


def test_a_candidate_may_be_tuned_while_it_is_measured(gpu: FakeGpu) -> None:
    """A primitive's implementation is a candidate, and so are the shapes its kernel takes."""
    inner = Problem("kernel", (1,))

    def run(candidate: str) -> Callable[[], object]:
        return lambda: gpu.choose(problem=inner) if candidate == "tuned" else "c"

    found = tuning.choose(PROBLEM, ["plain", "tuned"], run, device=GPU)
    assert found == "tuned"
    assert {p: c.name for p, c in tuning.kept(GPU).items()} == {PROBLEM: "tuned", inner: "b"}


def test_the_timer_empties_the_cache_before_it_starts_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            seen.append("event")

        def synchronize(self) -> None:
            seen.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 0.25

    found = SimpleNamespace(L2_cache_size=2048)
    monkeypatch.setattr(measure, "FLUSH_BYTES", 64)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.Tensor, "zero_", lambda self: seen.append(f"{self.numel() * self.itemsize} bytes")
    )
    monkeypatch.setattr(torch, "amax", lambda t, **_: seen.append(f"read {t.numel()} numbers"))
    with measure.gpu_timer(CPU) as milliseconds:
        assert milliseconds(lambda: seen.append("launch")) == 0.25
    flushes = ["4096 bytes"] * measure.FLUSHES
    assert seen == [*flushes, "read 1024 numbers", "event", "launch", "event", "wait"]


def test_candidates_are_prepared_together_before_any_is_launched(gpu: FakeGpu) -> None:
    """Those that can be had: what fails before is left out."""
    seen: list[list[object]] = []

    def prepare(thunks: Sequence[measure.Thunk]) -> None:
        assert not gpu.launched
        seen.append([thunk() for thunk in thunks])

    def run(candidate: str) -> Callable[[], object]:
        if candidate == "a":
            raise ValueError("not for this shape")
        return gpu.run(candidate)

    assert tuning.choose(PROBLEM, list("abc"), run, device=GPU, prepare=prepare) == "b"
    assert seen == [["b", "c"]]
    assert tuning.choose(PROBLEM, list("abc"), run, device=GPU, prepare=prepare) == "b"
    assert len(seen) == 1, "what is known needs no preparation"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_smaller_of_two_products(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(size: int) -> Callable[[], object]:
        x = torch.randn(size, size, device="cuda")
        return lambda: x @ x

    monkeypatch.delenv("FASTRES_AUTOTUNE", raising=False)
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))
    tuning.forget()
    device = torch.device("cuda", torch.cuda.current_device())
    assert tuning.choose(PROBLEM, [4096, 256], run, device=device) == 256
    times = tuning.kept()[PROBLEM].milliseconds
    assert times["4096"] > times["256"] > 0
    assert tuning.cache_file(device).exists()
    tuning.forget()


# ---------------------------------------------------------------- files


def test_the_file_is_readable(gpu: FakeGpu) -> None:
    gpu.choose()
    text = tuning.cache_file(GPU).read_text()
    data = json.loads(text)
    assert (data["device"], data["arch"], data["torch"]) == (
        "Fake GPU (9000)",
        "9.0",
        torch.__version__,
    )
    assert data["choices"] == [
        {
            "kernel": "conv_fwd",
            "sizes": [64, 56, "float16", True],
            "source": "a1b2",
            "choice": "b",
            "ms": {"a": 2.0, "b": 1.0, "c": 4.0},
        }
    ]
    assert max(len(line) for line in text.splitlines()) < 200  # a line per choice


def test_kept_is_what_was_measured(gpu: FakeGpu) -> None:
    assert tuning.kept(GPU) == {}
    gpu.choose()
    expected = {PROBLEM: Choice("b", {"a": 2.0, "b": 1.0, "c": 4.0})}
    assert tuning.kept(GPU) == expected
    restart()
    assert tuning.kept(GPU) == expected


def test_the_file_is_named_after_all_that_a_time_depends_on(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fastres import __version__

    file = tuning.cache_file(GPU)
    assert file.parent == tmp_path / "cache"
    assert file.name.startswith("fake-gpu-9000_9.0_torch-2")
    assert file.name.endswith(f"_fastres-{__version__}.json")
    assert "_triton-" in file.name
    seen = {file}
    for change in (
        lambda: monkeypatch.setattr(torch, "__version__", "9.9.9"),
        lambda: monkeypatch.setattr("fastres.__version__", "9.9.9"),
        lambda: monkeypatch.setattr("fastres.tuning.machine._TRITONS", ()),
        lambda: monkeypatch.setattr(torch.cuda.get_device_properties(0), "minor", 9),
        lambda: monkeypatch.setattr(torch.cuda.get_device_properties(0), "name", "Other"),
    ):
        change()
        restart()
        seen.add(tuning.cache_file(GPU))
    assert len(seen) == 6


def test_with_rocm_the_architecture_is_gcns(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="Fake MI", gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert tuning.cache_file(GPU).name.startswith("fake-mi_gfx942-sramecc+-xnack_torch-")


def test_the_folder_follows_the_environment(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FASTRES_CACHE_DIR", "~/mine")
    assert tuning.cache_file(GPU).parent == tmp_path / "mine"
    monkeypatch.setenv("FASTRES_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.cache_file(GPU).parent == tmp_path / "xdg" / "fastres"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert tuning.cache_file(GPU).parent == tmp_path / ".cache" / "fastres"
    monkeypatch.setattr(Path, "home", _no_home)
    assert tuning.cache_file(GPU).parent.name == "fastres"


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(
    "content",
    [
        b'{"format": 1, "device": "Fake GPU (9000)", "choi',
        b"",
        b"\xff\xfe not utf-8",
        b"[1, 2]",
        b"null",
        b'{"format": 1, "device": "Another GPU", "choices": []}',
        b"[" * 100_000,
    ],
    ids=["truncated", "empty", "bytes", "list", "null", "foreign", "deep"],
)
def test_a_broken_file_warns_once_and_is_replaced(gpu: FakeGpu, content: bytes) -> None:
    file = tuning.cache_file(GPU)
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=re.escape(file.name)) as seen:
        found = [gpu.choose(problem=problem) for problem in (PROBLEM, OTHER)]
    assert found == ["b", "b"]
    assert len(seen) == 1
    restart()
    assert {p.kernel for p in tuning.kept(GPU)} == {"conv_fwd", "other"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data["choices"][0].pop("choice"),
        lambda data: data["choices"][0].update(sizes=7),
        lambda data: data["choices"][0].update(sizes=[[1]]),
        lambda data: data["choices"][0].update(ms=3),
        lambda data: data.update(format=2),
        lambda data: data.update(torch="0.1"),
    ],
)
def test_a_file_that_is_not_quite_ours_is_ignored(
    gpu: FakeGpu, damage: Callable[[dict[str, Any]], object]
) -> None:
    gpu.choose()
    file = tuning.cache_file(GPU)
    data = json.loads(file.read_text())
    damage(data)
    file.write_text(json.dumps(data))
    restart()
    with pytest.warns(RuntimeWarning, match=re.escape(file.name)):
        assert gpu.choose_anew() == ("b", ["a", "b", "c"])


def test_a_folder_that_cannot_be_written_warns_once(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match=re.escape(tuning.cache_file(GPU).name)) as seen:
        found = [gpu.choose(problem=problem) for problem in (PROBLEM, OTHER, PROBLEM)]
    assert found == ["b", "b", "b"]
    assert gpu.prepared == ["a", "b", "c"] * 2
    assert len(seen) == 1
    assert len(tuning.kept(GPU)) == 2


def test_a_write_that_fails_leaves_the_old_file(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: object, target: object) -> None:
        raise OSError("disk full")

    gpu.choose()
    file = tuning.cache_file(GPU)
    before = file.read_text()
    monkeypatch.setattr(os, "replace", fails)
    with pytest.warns(RuntimeWarning, match="cannot be written .disk full"):
        assert gpu.choose(problem=OTHER) == "b"
    assert file.read_text() == before
    assert not list(file.parent.glob("*.tmp"))


def test_a_lock_that_is_never_given_back_costs_the_file_not_the_step(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.1)
    file = tuning.cache_file(GPU)
    file.parent.mkdir()
    with FileLock(f"{file}.lock"), pytest.warns(RuntimeWarning, match="cannot be written"):
        assert gpu.choose() == "b"
    assert gpu.choose() == "b"


def test_what_another_process_wrote_meanwhile_stays(gpu: FakeGpu) -> None:
    gpu.choose()
    file = tuning.cache_file(GPU)
    theirs = Problem("theirs", (1,))
    data = json.loads(file.read_text())
    data["choices"].append({**theirs._asdict(), "choice": "c", "ms": {}})
    file.write_text(json.dumps(data))
    gpu.choose(problem=Problem("ours", (1,)))
    restart()
    assert {p.kernel for p in tuning.kept(GPU)} == {"conv_fwd", "theirs", "ours"}
    assert gpu.choose_anew(problem=theirs) == ("c", [])


CHOICES = 25


def _keep_many(file: Path, kernel: str, start: Any) -> None:
    machine = tuning.machine.Machine("Fake GPU", "9.0", "2", "3", "0")
    warnings.simplefilter("error")
    kept = store.Store(file, machine)
    start.wait(60)
    for i in range(CHOICES):
        kept.keep(Problem(kernel, (i,)), Choice("a", {"a": 1.0}))


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    file, start = tmp_path / "choices.json", context.Barrier(2)
    writers = [context.Process(target=_keep_many, args=(file, k, start)) for k in ("one", "two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(90)
    assert [writer.exitcode for writer in writers] == [0, 0]
    data = json.loads(file.read_text())
    assert len(data["choices"]) == 2 * CHOICES
    assert {f.name for f in tmp_path.iterdir()} <= {"choices.json", "choices.json.lock"}


# ---------------------------------------------------------------- tables that ship


def test_a_table_answers_before_anything_is_measured(gpu: FakeGpu, tmp_path: Path) -> None:
    ship(tmp_path, PROBLEM, "c")
    assert gpu.choose_anew() == ("c", [])
    assert gpu.choose_anew() == ("c", [])
    assert tuning.kept(GPU) == {}
    assert tuning.shipped(GPU) == {PROBLEM: Choice("c", {"c": 1.0})}
    assert gpu.choose_anew(problem=PROBLEM._replace(source="new")) == ("b", ["a", "b", "c"])


def test_what_was_measured_here_goes_before_a_table(gpu: FakeGpu, tmp_path: Path) -> None:
    gpu.choose()
    restart()
    ship(tmp_path, PROBLEM, "c")
    assert gpu.choose_anew() == ("b", [])


def test_a_table_with_a_candidate_that_vanished_is_ignored(gpu: FakeGpu, tmp_path: Path) -> None:
    ship(tmp_path, PROBLEM, "z")
    assert gpu.choose_anew() == ("b", ["a", "b", "c"])


def test_a_broken_table_warns_once(gpu: FakeGpu, tmp_path: Path) -> None:
    file = ship(tmp_path, PROBLEM, "c")
    file.write_text(file.read_text()[:-20])
    with pytest.warns(RuntimeWarning, match=re.escape(file.name)):
        assert gpu.choose() == "b"


def test_export_makes_a_table_that_answers(gpu: FakeGpu, tmp_path: Path) -> None:
    older = Problem("older", (3,))
    ship(tmp_path, older, "c")
    gpu.choose()
    file = tuning.export(tmp_path / "tables", GPU)
    assert file == tmp_path / "tables" / "fake-gpu-9000.json"
    assert list(json.loads(file.read_text())) == ["format", "device", "choices"]
    shutil.rmtree(tmp_path / "cache")
    restart()
    assert gpu.choose_anew() == ("b", [])
    assert gpu.choose_anew(problem=older) == ("c", [])
    assert tuning.shipped(GPU)[PROBLEM].milliseconds == {"a": 2.0, "b": 1.0, "c": 4.0}


def test_export_of_nothing_is_an_error(gpu: FakeGpu, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no choice was kept for Fake GPU \(9000\)"):
        tuning.export(tmp_path / "table.json", GPU)


def test_the_tables_in_the_package_can_be_read() -> None:
    for table in store.tables().iterdir():
        if table.name.endswith(".json"):
            device = json.loads(table.read_text())["device"]
            header: store.Header = {"format": store.FORMAT, "device": device}
            assert store.parse(table.read_text(), header), table.name


def test_tables_land_in_a_build(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("pyproject.toml needs setuptools 77")
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("fastres", "triton_kernels", "bench"):
        shutil.copytree(ROOT / name, tree / name, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "fastres" / "tuning" / "tables" / "some-gpu.json").write_text("{}")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    env = {**os.environ, "FASTRES_CPU": "0"}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lib" / "fastres" / "tuning" / "tables" / "some-gpu.json").exists()


# ---------------------------------------------------------------- doctor


def test_doctor_says_where_choices_are_and_why_there_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FASTRES_AUTOTUNE", "0")
    tuning.forget()
    facts = doctor.collect()["autotuner"]
    assert (facts["on"], facts["why_not"]) == (False, "FASTRES_AUTOTUNE=0")
    assert facts["file"].startswith(str(tmp_path))
    assert (facts["kept"], facts["shipped"]) == (0, len(tuning.shipped()))
    monkeypatch.setenv("FASTRES_AUTOTUNE", "2")
    tuning.forget()
    assert doctor.main([]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Autotuner measures no: FASTRES_AUTOTUNE must be 0 or 1, got '2'" in printed
    tuning.forget()


def test_doctor_counts_choices(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.choose()
    ship(tmp_path, PROBLEM, "b")
    restart()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    facts = doctor._autotuner()
    assert facts == {
        "on": True,
        "why_not": None,
        "file": str(tuning.cache_file(GPU)),
        "kept": 1,
        "shipped": 1,
    }
