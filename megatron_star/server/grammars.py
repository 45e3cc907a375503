"""Compiles what answers must look like, in threads of its own, after a process of its own has tried it."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_star.config import FieldError
from megatron_star.engine.grammar import Grammar
from megatron_star.engine.llguidance_grammar import Llguidance
from megatron_star.engine.llguidance_vocabulary import Vocabulary
from megatron_star.server.grammar_spec import GrammarSpec
from megatron_star.server.grammar_trial import CPU_SECONDS, MEMORY_BYTES
from megatron_star.text.token_bytes import TokenBytes

MOST_GRAMMAR_BYTES = 1 << 18
MOST_KEPT = 128
"""Grammars, or what is wrong with them: each of some 100 KiB, as far as it was used."""
SECONDS_FOR_A_TRIAL = 30.0
"""Of waiting: processors may be busy. The process itself has `CPU_SECONDS`."""

TOO_MUCH = (
    f"to compile, it takes more than {CPU_SECONDS} s of a processor, {MEMORY_BYTES >> 20} MiB of memory, or "
    "a deeper stack than there is"
)


class Grammars:
    """Those of a server's requests."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_tokens: Sequence[int], num_tokens: int
    ) -> None:
        """Nothing is made of the tokenizer before the first grammar.

        Args:
            end_tokens: that end an answer unless its request says otherwise.
            num_tokens: of the model.
        """
        self._tokenizer, self._end_tokens, self._num_tokens = tokenizer, end_tokens, num_tokens
        self._trial: Trial | None = None
        self._library: Llguidance | None = None
        self._kept: OrderedDict[tuple[str, str], Grammar | str] = OrderedDict()
        self._compiler = ThreadPoolExecutor(1, "grammar")

    async def compiled(self, spec: GrammarSpec) -> Grammar:
        """A grammar for any number of answers. Raises FieldError, which names the spec's field."""
        size = len(spec.text.encode())
        if size > MOST_GRAMMAR_BYTES:
            raise FieldError(
                f"{spec.field}: it has {size} bytes; the limit is {MOST_GRAMMAR_BYTES}", spec.field
            )
        found = await asyncio.get_running_loop().run_in_executor(self._compiler, self._find, spec)
        if isinstance(found, str):
            raise FieldError(f"{spec.field}: {found}", spec.field)
        return found

    def close(self) -> None:
        """End the process and the thread."""
        if self._trial:
            self._trial.end()
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def _find(self, spec: GrammarSpec) -> Grammar | str:
        """In the compiler's thread: a grammar, or what is wrong."""
        key = spec.kind, spec.text
        if key not in self._kept:
            self._kept[key] = self._compile(spec)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _compile(self, spec: GrammarSpec) -> Grammar | str:
        if not (self._trial and self._library):
            vocabulary = self._vocabulary()
            self._trial, self._library = Trial(vocabulary), Llguidance(vocabulary, self._encode)
        text, error = self._trial.ask(spec)
        return error or self._library.compile(text)

    def _vocabulary(self) -> Vocabulary:
        added = self._tokenizer.added_tokens_decoder.items()
        return Vocabulary(
            texts=TokenBytes(self._tokenizer).of_all(self._num_tokens),
            special=[token for token, piece in added if piece.special and token < self._num_tokens],
            end_tokens=[token for token in self._end_tokens if token < self._num_tokens],
        )

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


class Trial:
    """The process of `grammar_trial.py`, started when it is needed. Used by one thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, spec: GrammarSpec) -> tuple[str, str]:
        """See `grammar_trial.tried`."""
        process = self._process = self._process or self._started()
        timer = threading.Timer(SECONDS_FOR_A_TRIAL, process.kill)
        timer.start()
        try:
            _send(process, astuple(spec))
            text, error = json.loads(process.stdout.readline())
            return text, error
        except (OSError, ValueError):  # it has ended: what it wrote is no line
            self.end()
            return "", TOO_MUCH
        finally:
            timer.cancel()

    def end(self) -> None:
        """A next grammar starts another one."""
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe.close()

    def _started(self) -> subprocess.Popen[bytes]:
        # It finds this package where this process does.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "megatron_star.server.grammar_trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        _send(process, self._vocabulary.to_json())
        return process


def _send(process: subprocess.Popen[bytes], value: Any) -> None:
    process.stdin.write(json.dumps(value).encode() + b"\n")
    process.stdin.flush()
