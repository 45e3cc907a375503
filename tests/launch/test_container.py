"""What goes into the container: all that is installed, and no weights."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def kept() -> set[str]:
    """What .dockerignore, which begins with everything, lets in."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith(("#", "!"))] == ["*", "**/__pycache__"]
    return {line.removeprefix("!") for line in lines if line.startswith("!")}


def test_all_that_is_installed_and_started_gets_in_and_nothing_else():
    packages = re.search(r"include=\[(.*?)\]", (REPOSITORY / "setup.py").read_text()).group(1)
    folders = {name.removesuffix("*") for name in re.findall(r'"([^"]+)"', packages)} | {"launch"}
    assert kept() == folders | {"setup.py", "pyproject.toml", "scripts/install_in_container.sh"}


def test_what_the_dockerfile_runs_is_there():
    text = (REPOSITORY / "Dockerfile").read_text()
    for path in re.findall(r"(?:RUN |opt/megatron-star/)([\w/]+\.sh)", text):
        script = REPOSITORY / path
        assert script.stat().st_mode & 0o111
        assert any(path == name or path.startswith(f"{name}/") for name in kept())
    assert re.search(r"^ARG PYTORCH_TAG=\d\d\.\d\d-py3$", text, re.MULTILINE)
    assert re.search(r"^USER \d+$", text, re.MULTILINE) and "HEALTHCHECK" in text
