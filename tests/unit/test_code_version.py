"""Ranks that run different code are told apart."""

import pytest
import torch

from megatron_star.job.code_version import FOLDER, code_fingerprint, facts_of_code
from megatron_star.job.meeting import check_same_values
from megatron_star.parallel.control import SharedError


def test_a_changed_file_and_a_moved_file_change_the_fingerprint(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    first = code_fingerprint(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    second = code_fingerprint(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, code_fingerprint(tmp_path)}) == 3


def test_files_that_python_makes_do_not_count(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    before = code_fingerprint(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.cpython-312.pyc").write_bytes(b"1")
    assert code_fingerprint(tmp_path) == before


def test_ranks_with_other_code_are_named():
    check_same_values("code", ["a", "a", "a"])
    with pytest.raises(SharedError, match=r"rank 2, 3: other code than rank 0: b instead of a"):
        check_same_values("code", ["a", "a", "b", "c"])


def test_the_programs_code_counts_and_so_does_every_argument():
    assert FOLDER.name == "megatron_star"
    facts = facts_of_code(["--bf16", "--load=x"])
    assert facts["argument 1"] == "--bf16" and torch.__version__.startswith(facts["version of torch"])
