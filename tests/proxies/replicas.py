"""What run.sh runs: replicas behind nginx and HAProxy, under steady load, restarted one by one."""

import argparse
import json
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from time import monotonic, sleep

import httpx
from running_server import RunningServer, start_server, wait_for

PROXIES = Path(__file__).parents[2] / "docs/proxies"
NGINX, HAPROXY = "http://127.0.0.1:8080", "http://127.0.0.1:8081"
PORTS = (5001, 5002, 5003)
NOTICE_SECONDS = "3"
NUM_DOCUMENTS = 24
SECONDS_FOR_A_START = 120
MOST_MOVED = NUM_DOCUMENTS / 2
"""A third of them where the hash is consistent, two thirds where it is not."""
BEGIN = monotonic()


def say(text: str) -> None:
    """A step that has been taken."""
    print(f"{monotonic() - BEGIN:4.0f} s  {text}", flush=True)


class Replicas:
    """Servers of one rank by their ports."""

    def __init__(self, checkpoint: Path, work: Path) -> None:
        self.checkpoint, self.work = checkpoint, work
        self.servers: dict[int, RunningServer] = {}

    def start(self, port: int) -> RunningServer:
        """Begin to; it is not ready yet."""
        directory = self.work / f"{port}-{len(list(self.work.iterdir()))}"
        directory.mkdir()
        options = ("--served-model-name", "smollm2", "--drain-notice-seconds", NOTICE_SECONDS)
        self.servers[port] = start_server(self.checkpoint, directory, *options, num_ranks=1, port=port)
        return self.servers[port]

    def restart(self, port: int) -> None:
        """As an operator does: SIGTERM, the end, another start."""
        server = self.servers[port]
        server.ranks[0].terminate()
        assert server.ranks[0].wait(60) == 0, server.log()
        self.start(port).wait_until_ready(SECONDS_FOR_A_START)

    def wait_until_asked(self, port: int, proxy: str) -> None:
        """Until the proxy gives this one requests that name no document."""

        def is_asked() -> bool:
            before = self.num_answered(port)
            for _ in PORTS:
                completion(httpx, proxy, {"max_tokens": 1})
            sleep(0.1)  # for the line of the log
            return self.num_answered(port) > before

        wait_for(is_asked, 30)

    def num_answered(self, port: int) -> int:
        """By its log."""
        return self.servers[port].log().count('"route": "/v1/completions", "status": 200')


def completion(client, proxy: str, fields: dict, context: str | None = None) -> httpx.Response:
    """An answer through a proxy; `context` names the document that it is about."""
    body = {"model": "smollm2", "prompt": "The capital of France is", "temperature": 0} | fields
    headers = {} if context is None else {"X-Star-Context": context}
    return client.post(f"{proxy}/v1/completions", json=body, headers=headers, timeout=90)


class Load:
    """Clients that ask on without pause, each on a connection that it keeps, for three kinds of answers."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.counts: Counter[str] = Counter()
        self._over = threading.Event()

    @contextmanager
    def running(self, proxies: tuple[str, ...], num_clients: int) -> Iterator[None]:
        """So many clients of each proxy."""
        names = [(proxy, index) for proxy in proxies for index in range(num_clients)]
        threads = [threading.Thread(target=self._ask_on, args=name) for name in names]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def _ask_on(self, proxy: str, index: int) -> None:
        name = "nginx" if proxy == NGINX else "haproxy"
        count = index
        with httpx.Client() as client:
            while not self._over.is_set():
                kind = ("whole", "stream", "long body")[count % 3]
                count += 1
                try:
                    self._ask(client, proxy, kind)
                    self.counts[f"{name}, {kind}"] += 1
                except Exception as error:
                    self.failures.append(f"{name}, {kind}: {error!r}")

    def _ask(self, client: httpx.Client, proxy: str, kind: str) -> None:
        fields = {"max_tokens": 24, "ignore_eos": True, "stream": kind == "stream"}
        if kind == "long body":  # more than HAProxy's buffer
            fields |= {"max_tokens": 1, "prompt": "The capital" + " " * 40_000 + "is"}
        answer = completion(client, proxy, fields)
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text[:200]}"
        if kind == "stream":
            assert answer.text.endswith("data: [DONE]\n\n"), answer.text[-200:]
        else:
            assert json.loads(answer.text)["usage"]["completion_tokens"] == fields["max_tokens"]


def write_nginx_configuration(work: Path, *, without: int | None = None) -> None:
    """What the documents show, or that without a replica that is not there yet."""
    lines = (PROXIES / "nginx.conf").read_text().splitlines(keepends=True)
    kept = [line for line in lines if without is None or f":{without}" not in line]
    (work / "nginx.conf").write_text("".join(kept))


def reload_nginx(work: Path) -> None:
    """As an operator does who has added a line."""
    os.kill(int((work / "nginx.pid").read_text()), signal.SIGHUP)


@contextmanager
def proxies(work: Path) -> Iterator[None]:
    """Both. HAProxy knows of the third replica from the start, and finds it when it answers."""
    write_nginx_configuration(work, without=PORTS[2])
    commands = (
        ["nginx", "-p", str(work), "-c", "nginx.conf", "-g", "daemon off;"],
        ["haproxy", "-db", "-f", str(PROXIES / "haproxy.cfg")],
    )
    logs = [(work / f"{command[0]}.log").open("w") for command in commands]
    running = [
        subprocess.Popen(command, stdout=log, stderr=log) for command, log in zip(commands, logs, strict=True)
    ]
    try:
        yield
    finally:
        for process in running:
            process.kill()


def documents_of(proxy: str) -> list[str]:
    """Texts that nobody asked about through another proxy."""
    return [f"This is report {number}, read through {proxy}. " * 8 for number in range(NUM_DOCUMENTS)]


def question_finds(proxy: str, document: str, question: str) -> bool:
    """Whether it is encoded already where the question goes."""
    fields = {"contexts": [document], "prompt": question, "max_tokens": 1}
    answer = completion(httpx, proxy, fields, context=sha256(document.encode()).hexdigest())
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["star"]["cache_hit"]


def restart_one_by_one(replicas: Replicas) -> None:
    """While clients ask; none may notice."""
    load = Load()
    with load.running((NGINX, HAPROXY), num_clients=2):
        for port in PORTS[:2]:
            before = load.counts.total()
            replicas.restart(port)
            replicas.wait_until_asked(port, HAPROXY)
            say(f"replica {port} was restarted; {load.counts.total() - before} requests meanwhile")
    for kind, count in sorted(load.counts.items()):
        say(f"{kind}: {count} answered")
    kinds = Counter(failure.split(":")[0] for failure in load.failures)
    assert not load.failures, f"failed: {kinds}, as {load.failures[0]}"
    assert len(load.counts) == 6, "a kind of request was not asked at all"


def find_documents(replicas: Replicas) -> None:
    """Questions go where their document is, and mostly stay there when a third replica joins."""
    for proxy in (NGINX, HAPROXY):
        for document in documents_of(proxy):
            assert not question_finds(proxy, document, "Who?"), "it was there before anybody asked"
            assert question_finds(proxy, document, "Why?"), "a question did not find its document"
    say(f"{NUM_DOCUMENTS} documents through each proxy: each second question finds its document")
    answered = [replicas.num_answered(port) for port in PORTS[:2]]
    assert min(answered) > NUM_DOCUMENTS / 2, f"all documents are with one replica: {answered}"
    replicas.start(PORTS[2]).wait_until_ready(SECONDS_FOR_A_START)
    write_nginx_configuration(replicas.work)
    reload_nginx(replicas.work)
    for proxy in (NGINX, HAPROXY):
        replicas.wait_until_asked(PORTS[2], proxy)
        moved = [document for document in documents_of(proxy) if not question_finds(proxy, document, "How?")]
        say(f"{proxy}: a third replica has joined; {len(moved)} of {NUM_DOCUMENTS} documents moved to it")
        assert 0 < len(moved) <= MOST_MOVED
        assert all(question_finds(proxy, document, "When?") for document in moved), "it moved again"


def main() -> None:
    """All of it; an assertion that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    replicas = Replicas(args.load, args.work)
    with proxies(args.work):
        for port in PORTS[:2]:
            replicas.start(port)
        for port in PORTS[:2]:
            replicas.servers[port].wait_until_ready(SECONDS_FOR_A_START)
        say("two replicas are ready")
        restart_one_by_one(replicas)
        find_documents(replicas)
    say("tests/proxies/run.sh passed")


if __name__ == "__main__":
    main()
