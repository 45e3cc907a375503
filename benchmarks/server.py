"""Clients that stream chats from a running server, all at once: requests a second, TTFT, and time per token.

    torchrun --nproc-per-node 2 launch/run_text_generation_server.py --load .demo/megatron \\
        --context-parallel-size 2 --served-model-name smollm2 &
    python benchmarks/server.py --url http://127.0.0.1:5000 --clients 64 --requests 128

A half of the requests ask about one of four documents, the others are short. Times are the client's.
"""

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any, NamedTuple

import httpx

SENTENCES = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.")
SEPARATOR = "###"


class Times(NamedTuple):
    """Seconds of one request, and its tokens."""

    ttft: float
    total: float
    num_tokens: int
    cache_hit: bool


def chat(index: int, model: str, *, num_sentences: int, num_tokens: int) -> dict[str, Any]:
    """The body of one request."""
    first = index // 2 % 4
    document = " ".join(SENTENCES[(first + i) % 4] for i in range(num_sentences)) if index % 2 else ""
    return {
        "model": model,
        "messages": [{"role": "user", "content": f"{document}{SEPARATOR}What is number {index}?"}],
        "max_completion_tokens": num_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "star": {"separator": SEPARATOR},
    }


def ask(client: httpx.Client, url: str, body: dict[str, Any]) -> Times:
    """One stream, read to its end. Raises RuntimeError if it is not whole."""
    start, first, usage = perf_counter(), 0.0, None
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as stream:
        for line in stream.iter_lines():
            if not line.startswith("data: {"):
                continue
            data = json.loads(line.removeprefix("data: "))
            if "error" in data:
                raise RuntimeError(data["error"]["message"])
            if data["choices"] and data["choices"][0]["delta"].get("content"):
                first = first or perf_counter() - start
            usage = data.get("usage") or usage
    if usage is None:
        raise RuntimeError(f"status {stream.status_code} without a whole answer")
    total = perf_counter() - start
    return Times(first or total, total, usage["completion_tokens"], usage["star"]["cache_hit"])


def figures(times: list[Times], seconds: float) -> dict[str, float]:
    """What is reported."""
    ttft = statistics.quantiles([t.ttft for t in times], n=100, method="inclusive")
    per_token = [(t.total - t.ttft) / (t.num_tokens - 1) for t in times if t.num_tokens > 1]
    return {
        "requests": len(times),
        "seconds": seconds,
        "requests_per_second": len(times) / seconds,
        "tokens_per_second": sum(t.num_tokens for t in times) / seconds,
        "ttft_p50_s": ttft[49],
        "ttft_p95_s": ttft[94],
        "tpot_p50_s": statistics.median(per_token),
        "cache_hits": sum(t.cache_hit for t in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:5000")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--sentences", type=int, default=200, help="of a document; about 5 tokens each")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer, at most")
    args = parser.parse_args()
    with httpx.Client(timeout=600, limits=httpx.Limits(max_connections=args.clients)) as client:
        model = client.get(f"{args.url}/v1/models").json()["data"][0]["id"]
        bodies = [
            chat(index, model, num_sentences=args.sentences, num_tokens=args.tokens)
            for index in range(args.requests)
        ]
        start = perf_counter()
        with ThreadPoolExecutor(args.clients) as pool:
            times = list(pool.map(lambda body: ask(client, args.url, body), bodies))
    print(json.dumps({"clients": args.clients} | figures(times, perf_counter() - start), indent=1))


if __name__ == "__main__":
    main()
