"""Chat templates that came with a request: rendered in another process, with bounded time and memory.

Jinja's sandbox keeps a template from files and from the process, but not from looping for hours.
"""

import json
import os
import selectors
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic
from typing import Any

from megatron_star.text.chat_template import Chat, ChatTemplateError

WORKER = Path(__file__).with_name("template_worker.py")
SECONDS_TO_START = 60.0
SECONDS_OF_A_REQUEST = 2.0
"""Of a processor."""
SECONDS_TO_WAIT = 20.0
"""For an answer: a busy machine takes longer than a processor does."""
PIECE_BYTES = 1 << 20
TOO_LONG = f"the chat template of the request takes more than {SECONDS_OF_A_REQUEST:g} s"


class TemplateProcess:
    """One process, which takes one call at a time; started at the first call, and again after a failure."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, call: dict[str, Any]) -> dict[str, Any]:
        """What the worker makes of a call. Raises ChatTemplateError if it makes nothing of it."""
        line = json.dumps(call).encode() + b"\n"
        with self._lock:
            try:
                return self._answer(line)
            except (OSError, EOFError) as error:
                self._end()
                raise ChatTemplateError(
                    "the chat template of the request took too much time or memory"
                ) from error

    def _answer(self, line: bytes) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._line(SECONDS_TO_START)
        self._process.stdin.write(line)
        self._process.stdin.flush()
        return json.loads(self._line(SECONDS_TO_WAIT))

    def _line(self, seconds: float) -> bytes:
        """The next line. Raises TimeoutError, or EOFError where the process has ended."""
        deadline, output, found = monotonic() + seconds, self._process.stdout.fileno(), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while not found.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - monotonic())):
                    raise TimeoutError
                piece = os.read(output, PIECE_BYTES)
                if not piece:
                    raise EOFError
                found += piece
        return bytes(found)

    def _end(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


class ForeignTemplate:
    """The template of one request; all that it renders has the time of one request."""

    def __init__(self, text: str, process: TemplateProcess) -> None:
        self.text = text
        self._process, self._seconds = process, SECONDS_OF_A_REQUEST

    def render(self, chat: Chat, special_tokens: dict[str, Any]) -> str:
        """See `Template`."""
        if self._seconds <= 0:
            raise ChatTemplateError(TOO_LONG)
        call = {
            "conversations": [list(chat.messages)],
            "tools": chat.tools,
            "documents": chat.documents,
            "chat_template": self.text,
            "add_generation_prompt": chat.add_generation_prompt,
            "continue_final_message": chat.continue_final_message,
            "variables": special_tokens | dict(chat.variables),
            "seconds": self._seconds,
        }
        answer = self._process.render(call)
        self._seconds -= answer["seconds"]
        if "text" in answer:
            return answer["text"]
        if answer["type"] == "TypeError":
            raise TypeError(answer["error"])
        if answer["type"] == "TimeoutError":
            raise ChatTemplateError(TOO_LONG)
        raise ChatTemplateError(f"the chat template of the request refuses them: {answer['error']}")
