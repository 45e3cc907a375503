"""One server of two ranks on SmolLM2 for all tests of this folder; some tests start their own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from otlp_collector import Collector
from running_server import RunningServer, start_server


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Where the traces of `server` go."""
    with Collector() as receiving:
        yield receiving


@pytest.fixture(scope="session")
def server(smollm2, tmp_path_factory, collector) -> Iterator[RunningServer]:
    """Ready, with small blocks, so that a short text has several."""
    directory = tmp_path_factory.mktemp("server")
    running = start_server(
        smollm2[1],
        directory,
        "--served-model-name",
        "smollm2",
        "other-name",
        "--star-block-size",
        "256",
        "--otlp-traces-endpoint",
        collector.url,
        "--tool-call-parser",  # which its template does not show
        "hermes",
    )
    running.wait_until_ready()
    yield running
    running.end()


@pytest.fixture
def start(smollm2, tmp_path) -> Iterator[Callable[..., RunningServer]]:
    """Start a server of one's own; it is ended after the test."""
    servers: list[RunningServer] = []

    def start_another(*arguments: str, checkpoint: Path = smollm2[1], **options: int | None) -> RunningServer:
        directory = tmp_path / str(len(servers))
        directory.mkdir()
        servers.append(
            start_server(checkpoint, directory, "--served-model-name", "smollm2", *arguments, **options)
        )
        return servers[-1]

    yield start_another
    for running in servers:
        running.end()
