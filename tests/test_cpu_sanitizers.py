"""The CPU's convolutions and max pooling under AddressSanitizer and UBSan, by instruction set."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fastres.kernels.cpu import module

ROOT = Path(__file__).resolve().parent.parent
CXX = os.environ.get("CXX") or shutil.which("g++")
SOURCES = {
    "convolutions": ["activation", "convolution", "weight_gradient", "pack_weight"],
    "max_pool": ["activation", "max_pool"],
}
FLAGS = ["-std=c++20", "-O1", "-g", "-fopenmp", "-ffp-contract=off", "-Wno-psabi"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-static-libasan"]
ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
ISAS["avx512_bf16"] = ["-mavx512bf16", *ISAS["avx512"]]

if module.why_not_built() is not None or CXX is None:
    pytest.skip("fastres._cpu and a C++ compiler are needed", allow_module_level=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("isa", module.module().isas())
@pytest.mark.parametrize("kernels", SOURCES)
def test_kernels_stay_within_their_memory(kernels: str, isa: str, tmp_path: Path) -> None:
    if kernels == "max_pool" and isa == "avx512_bf16":
        pytest.skip("it pools by what AVX-512 has")
    program = tmp_path / kernels
    winograd = kernels == "convolutions" and isa != "avx512_bf16"
    names = [*SOURCES[kernels], *["pack_winograd"] * winograd]
    sources = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in names]
    main = ROOT / "tests" / "cpu_sanitizers" / f"{kernels}.cpp"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    command = [CXX, *FLAGS, f"-DFASTRES_ISA={isa}", *ISAS[isa], *includes]
    subprocess.run([*command, main, *sources, "-o", program], check=True)
    # OpenMP's runtime keeps its threads' memory until the process ends.
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
    assert done.stdout.endswith("0 wrong\n")
