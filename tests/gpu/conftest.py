"""Every test in this folder needs a GPU; docs/gpu.md says which of them have run, and where."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "families"))  # cases, dense
sys.path.append(str(Path(__file__).parents[1] / "distributed"))  # passed_keys_oracle


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once what failed: a GPU that is lent for minutes may be taken back before the end."""
    if report.failed:
        print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-1500:]}", file=sys.stderr, flush=True)


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    """The first GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    return torch.device("cuda", 0)
