"""launch/generate.py on ranks that share out the experts of a small random model."""

import json

import pytest
from models import dense_logits
from programs import REPOSITORY, error_lines, start_ranks, torchrun

from megatron_star.config import StarConfig
from megatron_star.evaluation.task_files import TaskFiles
from megatron_star.evaluation.tasks import NamedTask, SampleKey, SampleMaker
from megatron_star.text.tokenizer import load_tokenizer

GENERATE = "launch/generate.py"
NUM_GENERATED = 8
SPREAD = ["--context-parallel-size", 2, "--expert-model-parallel-size", 2]


def test_a_question_for_a_needle_has_the_greedy_tokens_of_the_dense_oracle(
    converted_with_tokenizer, tmp_path
):
    hf, megatron = converted_with_tokenizer("qwen3_moe")
    tokenizer = load_tokenizer(hf)
    maker = SampleMaker(tokenizer, TaskFiles(), chat=False)
    sample = maker.make(SampleKey(NamedTask.parse("niah_single_1"), 900, index=0, seed=0, depth=0.5))
    (tmp_path / "context.txt").write_text(sample.context)
    (tmp_path / "query.txt").write_text(sample.query)
    files = ["--context-file", tmp_path / "context.txt", "--query-file", tmp_path / "query.txt"]
    sizes = ["--star-block-size", 100, "--top-k", 1, "--num-tokens-to-generate", NUM_GENERATED]

    asked = ["--load", megatron, *SPREAD, *files, *sizes, "--output", tmp_path / "out.json"]
    run = torchrun(2, GENERATE, *asked, timeout=240)

    assert run.returncode == 0, run.stderr
    answer = json.loads((tmp_path / "out.json").read_text())
    context, query = (
        tokenizer.encode(text, add_special_tokens=False) for text in (sample.context, sample.query)
    )
    assert (answer["num_context_tokens"], answer["num_blocks"]) == (len(context), -(-len(context) // 100))
    before = len(context) + len(query)
    star = StarConfig(block_size=100)
    logits = dense_logits(hf, [*context, *query, *answer["tokens"]], len(context), star)
    assert logits[before - 1 : -1].argmax(-1).tolist() == answer["tokens"]


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("qwen3_moe", [3], "expert-parallel size 3 x expert-tensor-parallel size 1 must divide the 2 ranks"),
        ("llama_biases", [2], "expert-parallel size 2: the model has no experts"),
    ],
)
def test_experts_that_cannot_be_spread_end_all_ranks_with_one_line(
    converted_with_tokenizer, tmp_path, name, sizes, message
):
    (tmp_path / "context.txt").write_text("one two three")
    checkpoint = converted_with_tokenizer(name).megatron
    asked = ["--load", checkpoint, "--query", "why?", "--context-file", tmp_path / "context.txt"]
    asked += ["--context-parallel-size", 2, "--expert-model-parallel-size", *sizes]
    ranks = start_ranks(2, *map(str, [REPOSITORY / GENERATE, *asked]))
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    (line,) = error_lines("\n".join(errors))
    assert message in line
