"""The stage that says where the time goes: the device's kernels of an encoding and of a generated token."""

from collections.abc import Callable
from time import perf_counter

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.decode import filled_context
from benchmarks.gpu.bench import Bench, plan_of, written
from benchmarks.gpu.encoding import encoding_options, timed_encoding
from megatron_star.algorithm.token_generation import Sequence, generate_step

NUM_KERNELS, NAME_LENGTH = 10, 60


def profiled(bench: Bench) -> None:
    """32K tokens exact and with passed keys, and a token after 32K; the most expensive kernels of each."""
    star_model, num_tokens = bench.star_model, 4 * bench.unit
    for way in ("exact", "passed"):
        plan, costs = plan_of(star_model, num_tokens, **encoding_options(way, bench.unit))
        if bench.has_time_for(plan.cost(costs), repeats=2):
            label = f"{written(num_tokens)} {way}"
            _profile(bench, label, lambda plan=plan: timed_encoding(bench, star_model, plan))
    sequence = Sequence(filled_context(star_model, num_tokens), 0)
    _profile(
        bench, f"a token after {written(num_tokens)}", lambda: generate_step(star_model, [(sequence, [1])])
    )


def _profile(bench: Bench, label: str, work: Callable[[], object]) -> None:
    """A figure for all, and one for each of the kernels that take longest."""
    on_gpu = bench.device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with bench.figure("profile", label) as found:
        work()  # libraries begin
        with profile(activities=activities, acc_events=True) as profiler:
            start = perf_counter()
            work()
            bench.synchronize()
            seconds = perf_counter() - start
        kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
        events = [event for event in profiler.key_averages() if event.device_type == kind]
        microseconds = {
            event: getattr(event, f"self_{'device' if on_gpu else 'cpu'}_time_total") for event in events
        }
        busy = sum(microseconds.values()) or 1.0
        found |= {"ms": seconds * 1e3, "busy_ms": busy / 1e3, "calls": sum(event.count for event in events)}
        for event in sorted(events, key=microseconds.__getitem__, reverse=True)[:NUM_KERNELS]:
            figures = {
                "busy_ms": microseconds[event] / 1e3,
                "calls": event.count,
                "share": microseconds[event] / busy,
            }
            bench.figures.write("profile", f"{label}: {event.key[:NAME_LENGTH]}", **figures)
