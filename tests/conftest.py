"""Fixtures and rules every test shares."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# Workers side by side (pytest -n) share the cores; read when torch is imported, and inherited.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import torch  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference models, data and golden files beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (golden files, models and data beside the checkout)")
    return SHARED


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def cap():
    """Limit torch to so many bytes of the device."""
    from halfbyte.pressure import join_segments

    def limit(nbytes: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), 0)

    yield limit
    limit(1 << 60)
    join_segments(False)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
