"""A job's engine: the driver uses it, the workers work for it."""

import math
from collections.abc import Callable, Sequence

from megatron_star.engine.answer import Answer
from megatron_star.engine.engine import StarEngine, run_worker
from megatron_star.engine.request import StarResult
from megatron_star.job.job import Job
from megatron_star.job.progress import ConsoleProgress
from megatron_star.parallel.control import on_driver


def run_engine[T](
    job: Job,
    prepare: Callable[[StarEngine], T],
    use: Callable[[StarEngine, T], None],
    *,
    max_running: int,
    max_wait_seconds: float = math.inf,
) -> None:
    """On the driver, `use` an engine with what `prepare` made of it; the workers work for it until then.

    Args:
        prepare: called on the driver, for what may fail because of the user's input: checks, and requests.
        use: called on the driver; when it returns, the engine is stopped.
        max_running: sequences that run at a time.
        max_wait_seconds: between two tokens of an answer while another context is encoded.

    Raises:
        SharedError: on all ranks, if `prepare` raised a ValueError or OSError.
    """

    def start() -> tuple[StarEngine, T]:
        engine = _engine(job, max_running, max_wait_seconds)
        return engine, prepare(engine)

    started = on_driver(start, job.groups.control)
    if started is None:
        run_worker(job.star_model, job.groups.control, job.stores and job.stores[1])
        return
    engine, prepared = started
    use(engine, prepared)
    engine.stop()


def _engine(job: Job, max_running: int, max_wait_seconds: float) -> StarEngine:
    return StarEngine(
        job.star_model,
        job.tokenizer,
        job.groups.control,
        max_sequence_length=job.max_sequence_length,
        budget_bytes_per_rank=job.budget,
        max_running=max_running,
        max_wait_seconds=max_wait_seconds,
        stores=job.stores,
    )


def answer_batch(engine: StarEngine, answers: Sequence[Answer]) -> list[StarResult]:
    """The results of what was prepared, with progress shown; raises ValueError if one has no answer."""
    for answer in answers:
        engine.enqueue(answer)
    with ConsoleProgress(sum(answer.plan.num_tokens for answer in answers)) as progress:
        while not all(answer.ended.is_set() for answer in answers):
            engine.step()
            progress.show(
                num_encoded=sum(answer.num_encoded_tokens for answer in answers),
                num_generated=sum(len(answer.tokens) for answer in answers),
            )
    results = [answer.result() for answer in answers]
    if failed := [result.error for result in results if result.error]:
        raise ValueError(f"{len(failed)} of {len(results)} requests have no answer: {failed[0]}")
    return results
