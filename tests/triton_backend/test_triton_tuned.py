"""The triton backend with what the autotuner chose, on GPUs alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from backend_checks import check_tuned_block

pytestmark = pytest.mark.gpu


def test_a_tuned_block_is_the_stock_block(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_tuned_block("triton", device, monkeypatch, tmp_path)
