"""`import fastres` is light, and survives a torchvision that does not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ZOOS = ("torchvision", "timm", "transformers")


def run(code: str, path: Path | None = None) -> str:
    prefix = "" if path is None else f"import sys; sys.path.insert(0, {str(path)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", prefix + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_zoo_is_imported() -> None:
    code = f"import sys, fastres; print([z for z in {ZOOS} if z in sys.modules])"
    assert run(code).strip() == "[]"


def test_nothing_heavy_is_imported() -> None:
    heavy = ("torch._dynamo", "torch._inductor", "triton", "matplotlib", "rich")
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        f"import fastres; print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    assert run(code).strip() == "[]"


def test_using_it_imports_no_zoo_either() -> None:
    code = (
        "import sys, torch, fastres\n"
        "model = fastres.models.resnet18(num_classes=2)\n"
        "fastres.convert(model), fastres.explain(model)\n"
        "model(torch.randn(2, 3, 32, 32)).sum().backward()\n"
        f"print([z for z in {ZOOS} if z in sys.modules])"
    )
    assert run(code).strip() == "[]"


def test_a_torchvision_that_raises_does_no_harm(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    code = (
        "import torch, fastres\n"
        "try:\n    import torchvision\nexcept RuntimeError: pass\n"
        "block = fastres.Bottleneck(16, 4)\n"
        "block(torch.randn(2, 16, 5, 5)).sum().backward()\n"
        "print(fastres.convert(torch.nn.Sequential(block)).fused)"
    )
    assert run(code, tmp_path).strip() == "1"


def test_a_torchvision_without_what_we_know_does_no_harm(tmp_path: Path) -> None:
    package = tmp_path / "torchvision" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "resnet.py").write_text("")
    code = (
        "import torch, torchvision.models.resnet, fastres\n"
        "block = fastres.Bottleneck(16, 4)\n"
        "print(type(block).__module__, fastres.convert(torch.nn.Sequential(block)).fused)"
    )
    assert run(code, tmp_path).strip() == "fastres.nn.blocks 1"
