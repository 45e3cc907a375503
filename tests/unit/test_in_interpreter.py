"""Runs the tests of `tests/interpreted`, which need a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "interpreted"
SECONDS = 600


def test_triton_kernels_in_the_interpreter_equal_their_twins():
    pytest.importorskip("triton", reason="Triton is in torch's CUDA builds and in the extra `dev`")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(FOLDER)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, timeout=SECONDS, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:]
