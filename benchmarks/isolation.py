"""One client sends fresh long contexts without pause: what others notice of it, over HTTP.

    torchrun --nproc-per-node 2 launch/run_text_generation_server.py --load .demo/megatron \\
        --context-parallel-size 2 --served-model-name smollm2 --star-max-wait-seconds 1 &
    python benchmarks/isolation.py --url http://127.0.0.1:5000 --max-wait-seconds 1

First short chats alone, then beside the long contexts and one answer that is streamed. The status is 1 if, of
the gaps between that answer's tokens, the 99th percentile is more than the longest wait that the server was
started with, or if the short chats' median TTFT is not under twice that alone plus this wait.
"""

import argparse
import json
import random
import statistics
import sys
import threading
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import httpx

SEPARATOR = "###"
WORDS = ("grass", "sky", "sun", "green", "blue", "yellow", "here", "we", "go", "and", "is", "the")
FIRST_TOKEN, LAST_TOKEN = 1000, 40_000
"""Ids that fresh contexts are drawn from: ordinary tokens of SmolLM2."""


class Client:
    """Requests to one server; each asks about something that was never asked about."""

    def __init__(self, args: argparse.Namespace, stopped: threading.Event) -> None:
        self.args, self.stopped, self._random = args, stopped, random.SystemRandom()
        headers = {"Authorization": f"Bearer {args.key}"} if args.key else {}
        self._http = httpx.Client(base_url=args.url, timeout=600, headers=headers)
        self.model = self._http.get("/v1/models").json()["data"][0]["id"]

    def short_chat(self) -> float:
        """TTFT in seconds of a chat about a short text."""
        text = " ".join(self._random.choice(WORDS) for _ in range(self.args.chat_words))
        start = perf_counter()
        for arrived in self._stream(f"{text}{SEPARATOR}What is this?", num_tokens=4):
            return arrived - start
        raise RuntimeError("a chat ended without a token")

    def gaps(self) -> list[float]:
        """Seconds between the tokens of answers, one after the other, until it is stopped."""
        found: list[float] = []
        while not self.stopped.is_set():
            before = None
            for arrived in self._stream(f"{SEPARATOR}Tell a long story.", num_tokens=self.args.tokens):
                found += [arrived - before] if before else []
                before = arrived
                if self.stopped.is_set():
                    break
        return found

    def long_contexts(self) -> int:
        """How many were encoded, one after the other, until it is stopped."""
        count = 0
        while not self.stopped.is_set():
            num_tokens = self.args.context_tokens + 16
            prompt = [self._random.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(num_tokens)]
            body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "star": {"query_tokens": 16}}
            answer = self._http.post("/v1/completions", json=body)
            answer.raise_for_status()
            assert answer.json()["usage"]["star"]["cached_tokens"] == 0
            count += 1
        return count

    def _stream(self, content: str, *, num_tokens: int) -> Iterator[float]:
        """When each token arrived; several in one step come at the same time."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_completion_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
            "star": {"separator": SEPARATOR, "speculate": "off"},
        }
        with self._http.stream("POST", "/v1/chat/completions", json=body) as stream:
            for line in stream.iter_lines():
                data = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
                if "error" in data:
                    raise RuntimeError(data["error"]["message"])
                if data.get("choices") and data["choices"][0]["delta"].get("content"):
                    yield perf_counter()


def percentile(values: list[float], percent: int) -> float:
    """Of at least two values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds alone and beside."""
    stopped, found = threading.Event(), {}

    def note(name: str, client: Client, function: Any) -> None:
        try:
            found[name] = function(client)
        finally:
            stopped.set() if name not in found else None

    chats = Client(args, stopped)
    chats.short_chat()  # the first one warms up
    alone = [chats.short_chat() for _ in range(args.chats)]
    threads = [
        threading.Thread(target=note, args=(function.__name__, Client(args, stopped), function))
        for function in (Client.long_contexts, Client.gaps)
    ]
    for thread in threads:
        thread.start()
    beside = []
    while len(beside) < args.chats and not stopped.wait(args.pause_seconds):
        beside.append(chats.short_chat())
    stopped.set()
    for thread in threads:
        thread.join()
    gaps = found["gaps"]
    return {
        "ttft_alone_p50_s": statistics.median(alone),
        "ttft_alone_p95_s": percentile(alone, 95),
        "ttft_beside_p50_s": statistics.median(beside),
        "ttft_beside_p95_s": percentile(beside, 95),
        "gaps": len(gaps),
        "gap_p50_s": statistics.median(gaps),
        "gap_p99_s": percentile(gaps, 99),
        "gap_max_s": max(gaps),
        "long_contexts": found["long_contexts"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:5000")
    parser.add_argument("--key", help="where the server asks for one")
    parser.add_argument("--max-wait-seconds", type=float, default=1.0, help="as the server was started")
    parser.add_argument("--context-tokens", type=int, default=5500)
    parser.add_argument("--chats", type=int, default=20, help="short ones, alone and then beside")
    parser.add_argument("--chat-words", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=400, help="of each streamed answer")
    parser.add_argument("--pause-seconds", type=float, default=0.5, help="between two short chats")
    args = parser.parse_args()
    times = measure(args)
    bound = 2 * times["ttft_alone_p50_s"] + args.max_wait_seconds
    holds = times["gap_p99_s"] <= args.max_wait_seconds and times["ttft_beside_p50_s"] < bound
    print(json.dumps(times | {"max_wait_s": args.max_wait_seconds, "ttft_bound_s": bound, "holds": holds}))
    sys.exit(not holds)


if __name__ == "__main__":
    main()
