"""launch/generate.py as users run it, on SmolLM2 and real ranks."""

import json
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from models import dense_logits
from programs import REPOSITORY, error_lines, python, start_ranks, torchrun
from ranks import star_logits
from transformers import AutoTokenizer

from megatron_star.config import StarConfig
from megatron_star.programs.generate import open_work, parse_arguments

pytestmark = pytest.mark.smollm2

TOWNS = ["Aldbury", "Brill", "Corfe", "Dunster", "Elmley", "Filey", "Goathland", "Hallaton"]
CONTEXT = "".join(
    f"In the year {1700 + 7 * i}, the town of {TOWNS[i % 8]} built its bridge number {i} over the river; "
    f"it took {i + 2} masons and cost {i * i + 11} crowns.\n"
    for i in range(24)
)
QUERY = "Question: which town built a bridge in the year 1749? Answer: the town of"
GENERATE = "launch/generate.py"
GREEDY = ["--top-k", 1, "--num-tokens-to-generate", 12]


def run_generate(megatron: Path, *args: object):
    """generate.py on two ranks of torchrun with greedy sampling."""
    return torchrun(2, GENERATE, "--load", megatron, "--context-parallel-size", 2, *GREEDY, *args)


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """Context and query as files."""
    (tmp_path / "context.txt").write_text(CONTEXT)
    (tmp_path / "query.txt").write_text(QUERY)
    return tmp_path / "context.txt", tmp_path / "query.txt"


@pytest.mark.parametrize("star", [{"block_size": 300}, {"block_size": 100, "neighbor_blocks": 1}])
def test_generate_gives_the_greedy_tokens_of_the_dense_oracle(smollm2, tmp_path, files, star):
    hf, megatron = smollm2
    options = [f"--star-{name.replace('_', '-')}={value}" for name, value in star.items()]
    output = tmp_path / "out.json"

    run = run_generate(
        megatron, "--context-file", files[0], "--query-file", files[1], "--output", output, *options
    )

    assert run.returncode == 0, run.stderr
    answer = json.loads(output.read_text())
    assert run.stdout.strip() == answer["text"].strip()
    tokenizer = AutoTokenizer.from_pretrained(hf)
    context, query = (tokenizer.encode(text, add_special_tokens=False) for text in (CONTEXT, QUERY))
    assert answer["num_context_tokens"] == len(context) > 800
    assert answer["num_blocks"] == -(-len(context) // star["block_size"])
    before = len(context) + len(query)
    logits = dense_logits(hf, context + query + answer["tokens"], len(context), StarConfig(**star))
    assert logits[before - 1 : -1].argmax(-1).tolist() == answer["tokens"]
    logprobs = logits[before - 1 : -1].log_softmax(-1).gather(1, torch.tensor(answer["tokens"])[:, None])
    assert answer["logprobs"] == pytest.approx(logprobs.flatten().tolist(), abs=1e-3)
    assert tokenizer.decode(answer["tokens"], skip_special_tokens=True) == answer["text"]


@pytest.mark.parametrize(("num_ranks", "tp_size"), [(2, 1), (3, 3)])
def test_smollm2_equals_the_dense_oracle_within_a_ten_thousandth(smollm2, num_ranks, tp_size):
    hf, megatron = smollm2
    tokens = AutoTokenizer.from_pretrained(hf).encode(CONTEXT + QUERY, add_special_tokens=False)[-330:]
    config = StarConfig(block_size=80)
    results = run_ranks(num_ranks, star_logits, str(megatron), tp_size, tokens, 300, 27, [config])
    expected = dense_logits(hf, tokens, 300, config)[326:]
    for (logits,) in results:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_an_interrupted_jsonl_run_resumes_with_what_is_missing(smollm2, tmp_path):
    _, megatron = smollm2
    questions = [
        {"context": CONTEXT[:400], "query": f"The town number {i} is", "id": f"q{i}"} for i in range(3)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    output = tmp_path / "out.jsonl"
    asked = ["--input-jsonl", tmp_path / "in.jsonl", "--output", output]

    run = run_generate(megatron, *asked)

    assert run.returncode == 0, run.stderr
    assert f"{output}: 3 answers, 3 of them new" in run.stderr
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[1] + lines[2][:40])

    run = run_generate(megatron, *asked)

    assert run.returncode == 0, run.stderr
    assert "1 of 3 answers are in" in run.stderr
    answers = output.read_bytes().splitlines(keepends=True)
    assert answers[0] == lines[1]
    first, _, third = map(json.loads, lines)
    assert [json.loads(answer)["tokens"] for answer in answers[1:]] == [first["tokens"], third["tokens"]]
    before = output.read_bytes()

    args = parse_arguments(list(map(str, ["--load", megatron, *asked, *GREEDY, "--stop", "x"])))
    message = r"'q0' was asked with another stop \(\[\], now \[\"x\"\]\): give another --output"
    with ExitStack() as held, pytest.raises(ValueError, match=message):
        open_work(args, held)
    assert output.read_bytes() == before


def test_generate_answers_a_chat_question_on_one_process_without_a_launcher(smollm2, files):
    files[0].write_text("")
    options = ["--chat", "--top-k", 1, "--context-file", files[0]]
    query = "What is the capital of France?"
    run = python(REPOSITORY / GENERATE, "--load", smollm2[1], *options, "--query", query)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "The capital of France is Paris.\n"
    assert run.stderr == ""


ERRORS = {
    "needs 2 ranks, but 1 were started": {"num_ranks": 1},
    "no-such-place": {"load": "no-such-place"},
    "the query is empty": {"query": " "},
    "the model's limit is 8192": {"context": CONTEXT * 12},
    "num_attention_heads 9 cannot be divided over tensor-parallel size 2": {"cp_size": 1, "tp_size": 2},
}


@pytest.mark.parametrize("message", ERRORS)
def test_a_wrong_start_ends_all_ranks_with_one_line(smollm2, files, message):
    case = {
        "num_ranks": 2,
        "cp_size": 2,
        "tp_size": 1,
        "query": QUERY,
        "context": CONTEXT,
        "load": smollm2[1],
    }
    case |= ERRORS[message]
    files[0].write_text(case["context"])
    sizes = ["--context-parallel-size", case["cp_size"], "--tensor-model-parallel-size", case["tp_size"]]
    asked = ["--load", case["load"], "--context-file", files[0], "--query", case["query"]]
    ranks = start_ranks(case["num_ranks"], *map(str, [REPOSITORY / GENERATE, *asked, *sizes]))
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2] * case["num_ranks"]
    (line,) = error_lines("\n".join(errors))
    assert re.search(message, line)
    assert "Traceback" not in "".join(errors)
