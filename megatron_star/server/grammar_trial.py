"""A process of its own, in which a grammar is compiled and walked through before the server does.

No limit of the library bounds what some grammars take: there are intersections of regular expressions that
take hours, and references that nest until the stack ends. Here that costs this process, which starts again.
It reads lines of JSON from stdin: a `Vocabulary`, then `GrammarSpec`s. For each of these it writes a line to
stdout: what `tried` says.
"""

import json
import resource
import sys
import threading
from random import Random

from llguidance import LLTokenizer

from megatron_star.engine.llguidance_vocabulary import Vocabulary, error_of, make_matcher, make_tokenizer
from megatron_star.server.grammar_spec import GrammarSpec
from megatron_star.server.grammar_text import grammar_text

CPU_SECONDS = 2
"""For one grammar; the kernel ends the process beyond it, give or take a second."""
MEMORY_BYTES = 1 << 30
STACK_BYTES = 4 << 20
"""Half of what the server's threads have: what fits here fits there."""
NUM_STEPS = 8
"""Of the walk, which shows what takes long only once an answer has begun."""


class _LongestTokens:
    """Cuts a text as no tokenizer does, but soon: here it matters only that it is cut."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        special = {*vocabulary.special, *vocabulary.end_tokens}
        self._tokens = {text: token for token, text in enumerate(vocabulary.texts) if token not in special}
        self._longest = max(map(len, filter(None, self._tokens)), default=1)

    def __call__(self, text: str) -> list[int]:
        left, tokens = text.encode(), []
        while left:
            size = next((n for n in range(self._longest, 0, -1) if left[:n] in self._tokens), 0)
            if not size:
                break
            tokens.append(self._tokens[left[:size]])
            left = left[size:]
        return tokens


def tried(tokenizer: LLTokenizer, spec: GrammarSpec) -> tuple[str, str]:
    """What to compile, and an empty text; or nothing, and what is wrong with it."""
    try:
        text = grammar_text(spec)
        _walk(tokenizer, text)
    except Exception as error:  # also of a library's converter: it is about the text in any case
        return "", str(error) or type(error).__name__
    return text, ""


def _walk(tokenizer: LLTokenizer, text: str) -> None:
    matcher, random = make_matcher(tokenizer, text), Random(0)
    for _ in range(NUM_STEPS):
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(error_of(matcher))
        bytes_of_any = [(place, byte) for place, byte in enumerate(mask) if byte]
        allowed = [8 * place + bit for place, byte in bytes_of_any for bit in range(8) if byte >> bit & 1]
        matcher.consume_token(random.choice(allowed))
        if matcher.is_stopped():
            return


def _allow_cpu_seconds() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))


def _serve() -> None:
    vocabulary = Vocabulary.from_json(json.loads(sys.stdin.readline()))
    tokenizer = make_tokenizer(vocabulary, _LongestTokens(vocabulary))
    for line in sys.stdin:
        _allow_cpu_seconds()
        print(json.dumps(tried(tokenizer, GrammarSpec(*json.loads(line)))), flush=True)


def main() -> None:
    """Until stdin ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
