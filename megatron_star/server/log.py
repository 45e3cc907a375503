"""The log: JSON lines on a stream whose reader may be slow, or gone."""

import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from time import monotonic, sleep

MOST_WAITING_LINES = 4096
LOGGERS = {
    "megatron_star.server": logging.INFO,
    "megatron_star.speed": logging.INFO,
    "uvicorn": logging.WARNING,
    "asyncio": logging.WARNING,
    "opentelemetry": logging.WARNING,
}


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level and message, then the fields that came with it."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class LineWriter:
    """Writes lines in a thread of its own, so that nobody waits for whoever reads them.

    Lines for which there is no room are dropped, and so are those that cannot be written. It writes past
    Python's stream: a thread that waits inside of that would hold its lock, also when the process ends.

    Attributes:
        num_dropped: lines that were dropped so far.
    """

    def __init__(self, descriptor: int, most_waiting: int = MOST_WAITING_LINES) -> None:
        self.num_dropped = 0
        self._descriptor, self._lock = descriptor, threading.Lock()
        self._lines: queue.Queue[str] = queue.Queue(most_waiting)
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def write(self, line: str) -> bool:
        """Hand a line over; False if it was dropped."""
        taken = self.offer(line)
        if not taken:
            self._drop()
        return taken

    def offer(self, line: str) -> bool:
        """The same, of a line that does not count where there is no room."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            return False
        return True

    def flush(self, seconds: float) -> None:
        """Wait until everything is written, at most so long."""
        deadline = monotonic() + seconds
        while self._lines.unfinished_tasks and monotonic() < deadline:
            sleep(0.01)

    def _run(self) -> None:
        while True:
            rest = f"{self._lines.get()}\n".encode(errors="backslashreplace")
            try:
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except OSError:  # whoever read it is gone
                self._drop()
            self._lines.task_done()

    def _drop(self) -> None:
        with self._lock:
            self.num_dropped += 1


class LineHandler(logging.Handler):
    """Hands lines to a `LineWriter`, and tells how many were dropped as soon as there is room again."""

    def __init__(self, writer: LineWriter, note_dropped: Callable[[int], object]) -> None:
        """note_dropped: called with the number of lines that were dropped since the last call."""
        super().__init__()
        self._writer, self._note_dropped = writer, note_dropped
        self._num_noted = self._num_told = 0

    def emit(self, record: logging.LogRecord) -> None:
        """One line; `logging` lets one thread in at a time."""
        written, dropped = self._writer.write(self.format(record)), self._writer.num_dropped
        if dropped > self._num_noted:
            self._note_dropped(dropped - self._num_noted)
            self._num_noted = dropped
        if written and dropped > self._num_told:
            fields = {"count": dropped - self._num_told}
            line = {"levelname": "WARNING", "msg": "log lines dropped", "fields": fields}
            if self._writer.offer(self.format(logging.makeLogRecord(line))):
                self._num_told = dropped


def log_to_stderr(note_dropped: Callable[[int], object]) -> LineWriter:
    """Let the server's, uvicorn's and asyncio's loggers write JSON lines; returns what writes them."""
    writer = LineWriter(sys.stderr.fileno())
    handler = LineHandler(writer, note_dropped)
    handler.setFormatter(JsonLines())
    for name, level in LOGGERS.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    return writer
