"""`megatron-star PROGRAM` runs the program."""

from importlib.util import find_spec

import pytest

from megatron_star.programs.cli import PROGRAMS, main

# Other tests have imported the programs already; a process of its own has not.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_exists_and_has_help(name, capsys):
    assert find_spec(PROGRAMS[name][0]) is not None
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_without_a_program_the_programs_are_listed(capsys):
    main([])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in PROGRAMS)


def test_an_unknown_program_is_refused_by_name(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["served"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: no program 'served': one of generate, serve,")


def test_arguments_reach_the_program_and_its_error_is_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--model", str(tmp_path), "--context", "1K", "--gpus", "8"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: not a checkpoint")
