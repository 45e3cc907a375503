"""Bad and odd requests against a running server: never a 500, never a hang, memory flat.

    python tests/server/odd_requests.py --url http://127.0.0.1:5000 --pid PID_OF_RANK_0 --count 5000

Half are made by schemathesis from the server's own OpenAPI description, half by hand below. A good request
must be answered after each hundred. JSON lines say what came back; the status is 1 if a promise was broken.
"""

import argparse
import json
import random
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

HANG_SECONDS = 120.0
JSON_HEADERS = {"Content-Type": "application/json"}
GOOD = {"prompts": ["The capital of France is"], "tokens_to_generate": 1, "top_k": 1}
ROUTES = {
    ("PUT", "/api"): {"prompts": ["Odd"], "tokens_to_generate": 1},
    ("POST", "/completions"): {"prompt": "Odd", "max_tokens": 1},
    ("POST", "/v1/completions"): {"model": "smollm2", "prompt": "Odd", "max_tokens": 1},
    ("POST", "/v1/chat/completions"): {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Odd"}],
        "max_completion_tokens": 1,
    },
    ("POST", "/v1/contexts"): {"text": "Odd", "ttl_seconds": 5},
}
VALUES = [
    *(None, True, "", "x", "1", -1, 0, 1, 2.5, 1e308, -1e308, 1 << 31, 1 << 63, 1 << 70, -(1 << 63), 10**400),
    *(1e-300, 1e-45, 0.0, float("nan"), float("inf"), [], {}, [[]], [None], [1, "x"], [[1], "x"], {"a": {}}),
    *("\ud800", "\x00", "\u202e\u0301", "🦙" * 100, "<|im_end|>", " " * 5000, "a" * 5000, "{{ 7 * 7 }}"),
    *(["x"] * 200, [1 << 40], [-1], [0] * 5000, [[0]] * 200, ["x", ""], "../../etc/passwd"),
]
FIELDS = [
    *("prompts", "contexts", "tokens_to_generate", "temperature", "top_k", "top_p", "logprobs", "add_BOS"),
    *("random_seed", "stop_token", "star", "prompt", "max_tokens", "n", "best_of", "seed", "stop", "echo"),
    *("stream", "stream_options", "messages", "model", "max_completion_tokens", "debug_fname", "beam_width"),
    *("text", "tokens", "name", "wait", "for_chat", "ttl_seconds", "context_id", "chat_template_kwargs"),
    *("min_p", "repetition_penalty", "frequency_penalty", "allowed_token_ids", "bad_words", "min_tokens"),
    *("stop_token_ids", "top_logprobs", "truncate_prompt_tokens", "return_token_ids", "ignore_eos"),
    *("include_stop_str_in_output", "skip_special_tokens", "return_tokens_as_token_ids", "prompt_logprobs"),
    *("logit_bias", "presence_penalty", "response_format", "tools", "a.b", "\ud800", "__proto__", "x" * 5000),
    *("star.mode", "star.block_size", "star.anchor_size", "star.neighbor_blocks", "star.passed_keys"),
    *("star.query_tokens", "star.separator", "star.x", "messages.0", "messages.0.role", "messages.0.content"),
]
MEGABYTES_10 = 10 << 20
HUGE = [
    lambda: json.dumps(GOOD | {"prompts": ["a" * MEGABYTES_10]}).encode(),
    lambda: json.dumps(GOOD | {"prompts": [" " * MEGABYTES_10]}).encode(),
    lambda: json.dumps(GOOD | {"prompts": ["word and " * (MEGABYTES_10 // 9)]}).encode(),
    lambda: json.dumps(GOOD | {"contexts": ["1" * MEGABYTES_10]}).encode(),
    lambda: json.dumps(GOOD | {"prompts": [["\u0301"] * 100_000]}).encode(),
    lambda: b"x" * (17 << 20),
    lambda: b" " * MEGABYTES_10,
    lambda: b"9" * MEGABYTES_10,
]
BODIES = [
    *(
        b"",
        b"null",
        b"[]",
        b"{",
        b'"x"',
        b"\xff\xfe\x00",
        b'{"prompts": ["\xff"]}',
        b"[" * 50_000,
        b'{"a":' * 50_000,
    ),
    *(b"9" * 5000, b'{"prompts": ["x"], "prompts": 5}', b"NaN", b"\x00" * 100, b'{"prompts": ["\\ud800"]}'),
]


class Findings:
    """What came back, counted; and what must not happen."""

    def __init__(self, url: str) -> None:
        self.url, self.statuses, self.broken = url, Counter(), []
        self.slowest, self.num_sent = 0.0, 0
        self._lock = threading.Lock()

    def note(self, what: str, status: int | str, seconds: float) -> None:
        """One request; a good one follows each hundredth."""
        with self._lock:
            self.statuses[str(status)] += 1
            self.num_sent += 1
            self.slowest = max(self.slowest, seconds)
            due = self.num_sent % 100 == 0
        if status in (500, "hang"):
            self.broken.append(f"{status}: {what[:300]}")
        if due:
            self.ask_well()

    def ask_well(self) -> None:
        """A good request, which may be told to come again."""
        for _ in range(30):
            answer = httpx.put(f"{self.url}/api", json=GOOD, timeout=HANG_SECONDS)
            if answer.status_code != 429:
                break
        if answer.status_code != 200 or answer.json()["text"] != ["The capital of France is Paris"]:
            self.broken.append(
                f"a good request after {self.num_sent}: {answer.status_code} {answer.text[:300]}"
            )


def changed(body: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    """The body with one field set; `a.b` is in an object, `a.0` in a list."""
    body = json.loads(json.dumps(body))
    *parents, name = field.split(".") if "." in field else [field]
    at: Any = body
    for parent in parents:
        at = at[int(parent)] if isinstance(at, list) else at.setdefault(parent, {})
        if not isinstance(at, dict | list):
            return body | {field: value}
    if isinstance(at, list):
        at[:1] = [value]
    else:
        at[name] = value
    return body


def hand_made(generator: random.Random) -> Iterator[tuple[str, str, bytes]]:
    """Method, path and body, for ever; a hundredth is huge, a tenth is no JSON."""
    while True:
        (method, path), body = generator.choice(list(ROUTES.items()))
        kind = generator.random()
        if kind < 0.01:
            yield method, path, generator.choice(HUGE)()
        elif kind < 0.1:
            yield method, path, generator.choice(BODIES)
        else:
            for _ in range(generator.choice([1, 1, 2, 3])):
                fields = [
                    f for f in FIELDS if not f.startswith("messages.") or path.endswith("chat/completions")
                ]
                body = changed(body, generator.choice(fields), generator.choice(VALUES))
                if not isinstance(body.get("star", {}), dict) or not body.get("messages", [1]):
                    break
            yield method, path, json.dumps(body).encode()


def send(findings: Findings, method: str, path: str, body: bytes) -> None:
    """One request, as it is."""
    start = monotonic()
    try:
        status: int | str = httpx.request(
            method, findings.url + path, content=body, headers=JSON_HEADERS, timeout=HANG_SECONDS
        ).status_code
    except httpx.TimeoutException:
        status = "hang"
    except httpx.HTTPError as error:
        status = type(error).__name__
    findings.note(f"{method} {path} {body[:200]!r}", status, monotonic() - start)


def drop_connections(findings: Findings, count: int) -> None:
    """Connections that end in the middle of a request, or of its answer."""
    address = (urlsplit(findings.url).hostname, urlsplit(findings.url).port)
    body = json.dumps(GOOD | {"tokens_to_generate": 50}).encode()
    head = "PUT /api HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    for index in range(count):
        with socket.create_connection(address, timeout=HANG_SECONDS) as connection:
            connection.sendall(whole[: len(whole) * (index % 5 + 1) // 5])
            if index % 3 == 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        findings.note("a dropped connection", "dropped", 0.0)


def shortened(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A right body that a small model answers at once: few prompts, choices and tokens."""
    names = {"/api": ["tokens_to_generate"], "/v1/chat/completions": ["max_completion_tokens", "n"]}
    short = body | dict.fromkeys(names.get(path, ["max_tokens"]), 1)
    for name in ("prompts", "prompt"):
        if isinstance(short.get(name), list):
            short[name] = short[name][:3]
    if "n" in short and short["n"] is not None:
        short["n"] = 1
    return short


def send_generated(findings: Findings, description: dict[str, Any], count: int, seed: int) -> None:
    """Requests that schemathesis makes from the description, half of them meant to be wrong."""
    schema = schemathesis.openapi.from_dict(description)
    operations = [result.ok() for result in schema.get_all_operations()]
    each = max(1, count // (len(ROUTES) + 4))  # routes without input have few cases to send

    def run(operation, mode) -> None:
        @settings(
            max_examples=each,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def send_case(case) -> None:
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
                case.body = shortened(case.path, case.body)
            start = monotonic()
            try:
                status = case.call(base_url=findings.url, timeout=HANG_SECONDS).status_code
            except Exception as error:
                status = "hang" if "Timeout" in type(error).__name__ else type(error).__name__
            findings.note(f"{case.method} {case.path} {case.body!r}", status, monotonic() - start)

        with suppress(Unsatisfiable):  # what takes no input has no wrong one
            send_case()

    with ThreadPoolExecutor(6) as pool:
        for future in [
            pool.submit(run, operation, mode)
            for operation in operations
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        ]:
            future.result()


def send_all(url: str, count: int, seed: int = 0) -> Findings:
    """Half by hand, half generated, and some dropped connections."""
    findings = Findings(url)
    requests = islice(hand_made(random.Random(seed)), count // 2)
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(send, findings, *request) for request in requests]:
            future.result()
    drop_connections(findings, count // 50)
    send_generated(findings, httpx.get(f"{url}/openapi.json").json(), count - findings.num_sent, seed)
    findings.ask_well()
    return findings


def resident_megabytes(pid: int) -> float:
    """Of a process on this machine."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=2, help="parts of the count; memory is read after each")
    args = parser.parse_args()
    failed, megabytes = False, [resident_megabytes(args.pid)]
    for part in range(args.rounds):
        start = monotonic()
        findings = send_all(args.url, args.count // args.rounds, seed=part)
        megabytes.append(resident_megabytes(args.pid))
        report = {"requests": findings.num_sent, "statuses": findings.statuses, "slowest_s": findings.slowest}
        report |= {
            "seconds": monotonic() - start,
            "driver_megabytes": megabytes,
            "broken": findings.broken[:20],
        }
        print(json.dumps(report), flush=True)
        failed |= bool(findings.broken)
    sys.exit(failed)


if __name__ == "__main__":
    main()
