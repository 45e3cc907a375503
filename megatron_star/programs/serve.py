"""Serve a model over HTTP, to Megatron's and to OpenAI's clients, on all ranks of a job of torchrun or srun.

    torchrun --nproc-per-node 2 launch/run_text_generation_server.py --load CHECKPOINT \\
        --context-parallel-size 2 --port 5000
"""

import argparse
import logging
import signal
import sys
import threading
from time import monotonic

from megatron_star.engine.thread import EngineThread
from megatron_star.job.argument_types import ArgumentParser
from megatron_star.job.environment import read_environment
from megatron_star.job.job import loaded_job
from megatron_star.job.model_arguments import add_model_arguments
from megatron_star.job.running import run_engine
from megatron_star.job.session import end_process, exit_on_errors
from megatron_star.job.star_arguments import add_star_arguments, star_config
from megatron_star.parallel.control import DRIVER
from megatron_star.programs.server_arguments import add_server_arguments, server_settings
from megatron_star.server.app import create_app
from megatron_star.server.http_server import HttpServer, bind
from megatron_star.server.keys import KeyRing
from megatron_star.server.log import LineWriter, log_to_stderr
from megatron_star.server.metrics import ServerMetrics
from megatron_star.server.service import CompletionService
from megatron_star.server.state import ServerState
from megatron_star.server.traces import open_traces

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS_OF_AN_ECHO = 2.0
SECONDS_FOR_LAST_LINES = 1.0
log = logging.getLogger("megatron_star.server")
SECONDS_FOR_LAST_TRACES = 3.0


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises ValueError on a wrong one."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add_star_arguments(parser)
    add_server_arguments(parser)
    return parser.parse_args(argv)


class Frontend:
    """HTTP on the driver: it listens from the start, and answers once there is an engine."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Raises ValueError or OSError: a setting is wrong, or the address is taken."""
        self.args, self.settings = args, server_settings(args)
        if warning := self.settings.keys and self.settings.keys.warning():
            print(f"warning: {warning}", file=sys.stderr)
        endpoint = self.settings.otlp_traces_endpoint
        self._traces = open_traces(endpoint, self.settings.model_name) if endpoint else None
        listener = bind(args.host, args.port)
        self.state, self.metrics = ServerState(), ServerMetrics()
        self._log = log_to_stderr(self.metrics.note_dropped_lines)
        self._stdout = LineWriter(sys.stdout.fileno())
        app = create_app(self.settings, self.state, self.metrics, self._traces)
        self.server = HttpServer(
            app, self.settings, self.state, listener, lambda error: end_process(DRIVER, error)
        )
        self.port = listener.getsockname()[1]

    def service_of(self, engine: EngineThread) -> CompletionService:
        """What answers requests with this engine."""
        return CompletionService(engine, self.settings, self.metrics)

    def serve(self, service: CompletionService) -> None:
        """Answer requests until a signal, then drain; a second signal cuts that short."""
        signals = _CountedSignals()
        if self.settings.keys:
            signal.signal(signal.SIGHUP, lambda *_: self._read_keys_anew())
        service.engine.start(lambda error: end_process(DRIVER, error))
        self.server.open(service)
        self._stdout.write(f"ready: http://{self.args.host}:{self.port}/ serves {self.settings.model_name}")
        signals.first.wait()
        self._stdout.write("draining: no new requests")
        self.server.drain(
            self.args.drain_seconds,
            hurry=lambda: signals.count > 1,
            notice_seconds=self.args.drain_notice_seconds,
        )
        service.engine.stop()

    def _read_keys_anew(self) -> None:
        """In a thread of its own: what the signal has interrupted may hold the log's lock."""
        threading.Thread(target=_reload, args=(self.settings.keys,), name="keys", daemon=True).start()

    def say_stopped(self) -> None:
        """The last traces and lines, once the engine has stopped."""
        if self._traces:
            self._traces.close(SECONDS_FOR_LAST_TRACES)
        self._stdout.write("stopped")
        for writer in (self._stdout, self._log):
            writer.flush(SECONDS_FOR_LAST_LINES)


def _reload(keys: KeyRing) -> None:
    try:
        log.info("keys", extra={"fields": {"count": keys.reload()}})
    except (ValueError, OSError) as error:
        log.error("the keys stay as they were: %s", error)


class _CountedSignals:
    """Counts SIGTERM and SIGINT instead of ending at them.

    Those that follow within `SECONDS_OF_AN_ECHO` count as one: Slurm and the terminal signal torchrun and its
    ranks alike, and torchrun passes its own on.
    """

    def __init__(self) -> None:
        self.count, self.first, self._last = 0, threading.Event(), -SECONDS_OF_AN_ECHO
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        now = monotonic()
        self.count += now - self._last >= SECONDS_OF_AN_ECHO
        self._last = now
        self.first.set()


def leave_signals_to_the_driver() -> None:
    """A launcher signals all ranks; only the driver acts on it, and tells the workers when it is done."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def main() -> None:
    """Entry point of every rank."""
    with exit_on_errors(rank=0):
        environment = read_environment()
    with exit_on_errors(environment.rank):
        args = parse_arguments()
        warning = star_config(args).warning()
        if warning and environment.is_driver:
            print(f"warning: {warning}", file=sys.stderr)
        with loaded_job(args, environment, lambda: Frontend(args)) as (job, frontend):
            if not job.is_driver:
                leave_signals_to_the_driver()
            run_engine(
                job,
                lambda engine: frontend.service_of(EngineThread(engine, job.groups.watch)),
                lambda _, service: frontend.serve(service),
                max_running=args.max_concurrent_requests,
                max_wait_seconds=args.star_max_wait_seconds,
            )
            if frontend:
                frontend.say_stopped()


if __name__ == "__main__":
    main()
