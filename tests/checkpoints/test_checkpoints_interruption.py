"""A conversion that was killed leaves nothing that looks like a checkpoint."""

import os
import signal
import subprocess
import sys

import pytest

from checkpoints_tools import convert_hf_to_megatron
from megatron_star.model.checkpoint import read_checkpoint_info

_SLOW = """
import sys, time
from pathlib import Path
from checkpoints_tools import convert_hf_to_megatron
from checkpoints_tools.safetensors_files import HfWeights
read = HfWeights.read
def slow_read(self, name):
    print(name, flush=True)
    time.sleep(0.2)
    return read(self, name)
HfWeights.read = slow_read
convert_hf_to_megatron.convert(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_conversion_that_is_killed_halfway_leaves_nothing_that_loads(converted, tmp_path, kill):
    output = tmp_path / "output"
    command = [sys.executable, "-c", _SLOW, str(converted("llama_tied").hf), str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for _ in range(5):
        process.stdout.readline()
    os.kill(process.pid, kill)
    process.wait(30)
    leftovers = list(tmp_path.glob(".output.partial-*"))
    assert not output.exists()
    assert len(leftovers) == (1 if kill == signal.SIGKILL else 0)
    for directory in [output, *leftovers]:
        with pytest.raises(FileNotFoundError):
            read_checkpoint_info(directory)


def test_a_conversion_beside_the_leftovers_of_another_succeeds(converted, tmp_path):
    leftover = tmp_path / ".output.partial-abc"
    leftover.mkdir()
    convert_hf_to_megatron.convert(converted("llama_tied").hf, tmp_path / "output")
    assert read_checkpoint_info(tmp_path / "output").family == "llama" and leftover.is_dir()
