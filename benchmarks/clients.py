"""guidellm and aiperf as they are on PyPI, against a running server: what was answered, and its times.

    python3 -m venv /tmp/guidellm && /tmp/guidellm/bin/pip install guidellm
    python3 -m venv /tmp/aiperf && /tmp/aiperf/bin/pip install aiperf
    python benchmarks/clients.py --url http://127.0.0.1:5000 --model smollm2 --tokenizer .demo/hf \\
        --guidellm /tmp/guidellm/bin/guidellm --aiperf /tmp/aiperf/bin/aiperf

Each client that is given sends chats of the same size; the status is 1 if an answer failed or has another
length. The clients want environments of their own: they bring torch, and other versions of what is here.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple


class Load(NamedTuple):
    """What is sent: so many requests, so many at a time, of these numbers of tokens."""

    requests: int
    streams: int
    prompt_tokens: int
    output_tokens: int


def run_guidellm(args: argparse.Namespace, load: Load, directory: Path) -> dict[str, Any]:
    """Chats of one turn; guidellm sets `ignore_eos` and `continuous_usage_stats`."""
    report = directory / "guidellm.json"
    run(
        [args.guidellm, "run", "--disable-console", "--output", f"kind=json,path={report}"]
        + ["--backend", f"kind=openai_http,target={args.url},model={args.model}"]
        + ["--profile", f"kind=concurrent,streams={load.streams}"]
        + ["--constraint", f"kind=max_requests,count={load.requests}"]
        + ["--tokenizer", f"kind=huggingface_auto,model={args.tokenizer}"]
        + [
            "--data",
            f"kind=synthetic_text,prompt_tokens={load.prompt_tokens},output_tokens={load.output_tokens}",
        ]
    )
    metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    return {
        "answered": metrics["request_totals"]["successful"],
        "answer_tokens": metrics["output_token_count"]["successful"]["total_sum"],
        "ttft_ms": metrics["time_to_first_token_ms"]["successful"]["median"],
        "inter_token_ms": metrics["inter_token_latency_ms"]["successful"]["median"],
    }


def run_aiperf(args: argparse.Namespace, load: Load, directory: Path) -> dict[str, Any]:
    """Conversations of two turns: the second sends the first answer back."""
    run(
        [args.aiperf, "profile", "--url", args.url, "--model", args.model, "--tokenizer", args.tokenizer]
        + ["--endpoint-type", "chat", "--streaming", "--use-server-token-count", "--ui-type", "none"]
        + ["--concurrency", str(load.streams), "--num-conversations", str(load.requests // 2)]
        + ["--conversation-turn-mean", "2", "--conversation-turn-stddev", "0"]
        + ["--prompt-input-tokens-mean", str(load.prompt_tokens), "--prompt-input-tokens-stddev", "0"]
        + ["--prompt-output-tokens-mean", str(load.output_tokens), "--prompt-output-tokens-stddev", "0"]
        + ["--extra-inputs", "ignore_eos:true", "--extra-inputs", f"min_tokens:{load.output_tokens}"]
        + ["--no-gpu-telemetry", "--no-server-metrics", "--artifact-dir", str(directory / "aiperf")]
    )
    report = json.loads((directory / "aiperf/profile_export_aiperf.json").read_text())
    return {
        "answered": int(report["request_count"]["avg"]),
        "answer_tokens": int(report["total_osl"]["avg"]),
        "ttft_ms": report["time_to_first_token"]["p50"],
        "inter_token_ms": report["inter_token_latency"]["p50"],
    }


def run(command: list[str]) -> None:
    """Raises CalledProcessError; what the client says goes to stderr."""
    subprocess.run(command, stdout=sys.stderr, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:5000")
    parser.add_argument("--model", default="smollm2", help="the name that the server serves")
    parser.add_argument("--tokenizer", default=".demo/hf", help="folder of the model's tokenizer")
    parser.add_argument("--guidellm", metavar="PROGRAM")
    parser.add_argument("--aiperf", metavar="PROGRAM")
    parser.add_argument("--requests", type=int, default=8, help="an even number")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--output-tokens", type=int, default=16)
    args = parser.parse_args()
    args.tokenizer = str(Path(args.tokenizer).resolve())
    load = Load(args.requests, args.streams, args.prompt_tokens, args.output_tokens)
    expected = load.requests, load.requests * load.output_tokens
    failed = False
    for name, run_client in (("guidellm", run_guidellm), ("aiperf", run_aiperf)):
        if getattr(args, name):
            with tempfile.TemporaryDirectory() as directory:
                result = run_client(args, load, Path(directory))
            failed |= (result["answered"], result["answer_tokens"]) != expected
            print(json.dumps({"client": name, **load._asdict(), **result}), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
