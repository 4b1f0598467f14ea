"""The cuda backend with what the autotuner chose, on GPUs alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from backend_checks import check_graph_capture, check_tuned_block, needs_gpu

from fastres.kernels.cuda import channel_block

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["cuda", "auto"])
def test_a_tuned_block_is_the_stock_block(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_tuned_block(backend, device, monkeypatch, tmp_path)


def test_channel_blocks_are_captured_in_a_graph(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches that wait for each other's blocks."""
    needs_gpu(device)
    possible = channel_block.variants
    monkeypatch.setattr(channel_block, "variants", lambda *args: possible(*args)[-1:])
    check_graph_capture("cuda", "auto", device)
