"""A log whose reader does not read, or is gone, holds nobody up and loses nothing unsaid."""

import json
import logging
import os

import pytest

from megatron_star.server.log import JsonLines, LineHandler, LineWriter

LINE = "x" * 1000


@pytest.fixture
def pipe():
    """Its two ends, and room for some 64 KB between them."""
    read, write = os.pipe()
    yield read, write
    os.close(write)


def records(handler: LineHandler, count: int) -> None:
    for _ in range(count):
        handler.emit(logging.makeLogRecord({"msg": LINE, "levelname": "INFO"}))


def lines_of(read: int) -> list[dict]:
    os.set_blocking(read, False)
    text = b""
    try:
        while part := os.read(read, 1 << 20):
            text += part
    except BlockingIOError:
        pass
    return [json.loads(line) for line in text.decode().splitlines()]


def test_lines_that_nobody_reads_are_dropped_counted_and_told_of_later(pipe):
    read, write = pipe
    noted = []
    writer = LineWriter(write, most_waiting=8)
    handler = LineHandler(writer, noted.append)
    handler.setFormatter(JsonLines())

    records(handler, 500)  # 500 KB: neither the pipe nor the queue has so much room

    assert 300 < sum(noted) <= writer.num_dropped < 500
    first = lines_of(read)
    writer.flush(10)
    records(handler, 1)
    writer.flush(10)
    rest = first + lines_of(read)
    told = [line["count"] for line in rest if line["message"] == "log lines dropped"]
    assert sum(told) == sum(noted) == writer.num_dropped
    assert len(rest) - len(told) + sum(told) == 501


def test_a_reader_that_is_gone_ends_nothing(pipe):
    read, write = pipe
    os.close(read)
    writer = LineWriter(write)
    assert writer.write(LINE) and writer.write(LINE)
    writer.flush(10)
    assert writer.num_dropped == 2
