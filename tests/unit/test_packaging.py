"""What `pip install` puts into an environment: two packages, whole, and no name that another project has."""

import os
import zipfile
from pathlib import Path

import pytest
from setuptools import build_meta

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """The names of the files of the wheel that setup.py makes."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for path in REPOSITORY.iterdir():
        if not path.name.startswith("."):
            (source / path.name).symlink_to(path)  # what is built on the way is written here
    before = Path.cwd()
    os.chdir(source)
    try:
        name = build_meta.build_wheel(str(built))
    finally:
        os.chdir(before)
    return zipfile.ZipFile(built / name).namelist()


def test_a_wheel_installs_these_two_names_at_the_top(wheel):
    top = {name.split("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"megatron_star", "checkpoints_tools"}


@pytest.mark.parametrize("package", ["megatron_star", "checkpoints_tools"])
def test_a_wheel_has_every_file_of_its_packages(wheel, package):
    files = {
        str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / package).rglob("*") if path.is_file()
    }
    files = {name for name in files if "__pycache__" not in name}
    assert "megatron_star/server/page.html" in files or package != "megatron_star"
    assert {name for name in wheel if name.startswith(f"{package}/")} == files
