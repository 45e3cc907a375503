"""Command lines: every default is stated, every value has bounds, and what is wrong is one ValueError."""

import argparse
import random
from datetime import timedelta
from importlib import import_module

import pytest
import torch
from mutations import mutated

from megatron_star.job.sampling_arguments import sampling_params
from megatron_star.job.star_arguments import star_config
from megatron_star.programs import calibrate, contexts, encode_contexts, evaluate, generate, report
from megatron_star.programs import plan_cluster as plan
from megatron_star.programs import serve as run_text_generation_server
from megatron_star.programs.cli import PROGRAMS
from megatron_star.programs.server_arguments import server_settings

GENERATE = "--load x --context-file c --query q"
COMMANDS = {
    generate: f"{GENERATE} --seed 3 --temperature 0.5 --stop x --star-kv-gigabytes 1 --top-k 2",
    evaluate: "--load x --output o --lengths 1K --setting star --samples 2 --depths 0.5 --seed 1 "
    "--tasks variable_tracking:hops=2 frequent_words:alpha=2 niah_multikey_1:keys=3",
    calibrate: "--load x --input-jsonl i --output o --tolerance 0.1 --setting star --chat",
    contexts: "drop 1234 --context-store d",
    encode_contexts: "--load x --context-file c d --context-store s --context-store-bytes 5GB --chat",
    plan: "--model m --context 1K --gpus 8 --node-link 1 --wave-tokens 4K --block-size 1K",
    report: "a.jsonl --format text --tasks x --speed s.png",
    run_text_generation_server: "--load x --port 1 --drain-seconds 2 --max-request-bytes 1K --host h",
}


def parser_of(name: str, monkeypatch) -> argparse.ArgumentParser:
    """The parser that the program of this name makes."""
    made = []
    for parse in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(
            argparse.ArgumentParser, parse, lambda self, argv=None: made.append(self) or 1 / 0
        )
    program = import_module(name)
    with pytest.raises(ZeroDivisionError):
        getattr(program, "parse_arguments", program.main)()
    return made[0]


TOOLS = ("describe", "inspect", "from_gguf", "convert_megatron_to_hf")
WITH_HELP = {"megatron_star.programs.demo", *(f"checkpoints_tools.{name}" for name in TOOLS)}


@pytest.mark.parametrize("name", sorted(WITH_HELP | {module for module, _ in PROGRAMS.values()}))
def test_help_states_every_default(name, monkeypatch):
    parser = parser_of(name, monkeypatch)
    formatter = parser._get_formatter()
    for action in parser._actions:
        text = formatter._expand_help(action)
        required = action.required or not action.option_strings or isinstance(action, argparse._HelpAction)
        assert required or "default: " in text, (action.option_strings, text)
        assert text
    assert "default: None" not in parser.format_help()


def use(program, arguments: list[str]) -> None:
    """What a program makes of its arguments before it reads anything."""
    args = program.parse_arguments(arguments)
    if program is generate:
        star_config(args)
        sampling_params(args)
    if program is run_text_generation_server and not args.api_key_file:
        server_settings(args)


@pytest.mark.parametrize("program", COMMANDS, ids=lambda program: program.__name__)
def test_a_thousand_wrong_command_lines_are_taken_or_refused_with_a_value_error(program):
    generator, refused = random.Random(0), 0
    use(program, COMMANDS[program].split())
    for _ in range(1000):
        arguments = COMMANDS[program].split()
        place = generator.randrange(len(arguments))
        damaged = mutated(arguments[place].encode(), generator).replace(b"\0", b"")
        arguments[place] = damaged.decode(errors="surrogateescape")
        try:
            use(program, arguments)
        except ValueError:
            refused += 1
        except SystemExit as ended:
            assert ended.code == 0 and {"-h", "--help"} & set(arguments)
    assert refused > 200


WRONG = {
    "--temperature 1e-39": "'1e-39' is not 0, or a number of at least 0.001 and at most 1000",
    "--temperature nan": "'nan' is not 0, or a number",
    "--temperature -1": "'-1' is not 0, or a number",
    "--top-p 1.5": "'1.5' is not a number of at least 0 and at most 1",
    "--seed 18446744073709551616": "not a whole number of at least 0 and at most 18446744073709551615",
    "--distributed-timeout-minutes 10000000000000000": "not a whole number of at least 1 and at most 525600",
    "--star-kv-gigabytes nan": "'nan' is not a number of at least 1e-09",
    "--star-block-size 99999999999M": "'99999999999M' is too many: at most 1048576M",
    "--max-batch-size 99999999999999999999": "not a whole number of at least 1",
    "--num-tokens-to-generate " + "9" * 5000: "is not a whole number of at least 1",
}


@pytest.mark.parametrize("arguments", WRONG, ids=lambda arguments: arguments[:40])
def test_a_value_out_of_bounds_is_named_with_them(arguments):
    with pytest.raises(ValueError, match=WRONG[arguments]) as error:
        generate.parse_arguments(f"{GENERATE} {arguments}".split())
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("--stop", "", "argument --stop: it is empty"),
        ("--output", "", "argument --output: it is empty"),
        ("--stop", "\udcff", "argument --stop: the argument: .* is no character"),
    ],
)
def test_texts_are_not_empty_and_of_whole_characters(name, text, message):
    with pytest.raises(ValueError, match=message):
        generate.parse_arguments([*GENERATE.split(), name, text])


def test_the_largest_values_that_are_taken_work():
    largest = f"--seed {2**64 - 1} --temperature 1e-3 --distributed-timeout-minutes 525600"
    args = generate.parse_arguments(f"{GENERATE} {largest}".split())
    assert torch.Generator().manual_seed(args.seed).initial_seed() == 2**64 - 1
    assert args.distributed_timeout_minutes == timedelta(days=365)


def test_a_port_is_a_port():
    with pytest.raises(ValueError, match="'65536' is not a whole number of at least 0 and at most 65535"):
        run_text_generation_server.parse_arguments(["--load", "x", "--port", "65536"])


@pytest.mark.parametrize(
    "line",
    [
        "drop 1234 abcd --context-store d",
        "drop --context-store d 1234 abcd",
        "--context-store d drop 1234 abcd",
    ],
)
def test_contexts_to_drop_may_be_named_before_and_after_the_store(line):
    args = contexts.parse_arguments(line.split())
    assert (args.action, args.names, str(args.context_store)) == ("drop", ["1234", "abcd"], "d")
