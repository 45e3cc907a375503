"""Every end-of-sequence id that a checkpoint declares ends an answer."""

import json
import shutil

import pytest
from small_tokenizers import small_tokenizer
from transformers import AutoTokenizer

from checkpoints_tools.tokenizer_files import copy_tokenizer
from megatron_star.config import StarConfig
from megatron_star.evaluation.sample import Sample, greedy_request
from megatron_star.text.end_tokens import end_tokens, stop_tokens


@pytest.fixture
def load(tmp_path):
    """A tokenizer from a converted checkpoint's folder with these files."""

    def load(files: dict[str, object]):
        hf, converted = tmp_path / "hf", tmp_path / "converted"
        for folder in (hf, converted):
            shutil.rmtree(folder, ignore_errors=True)
        small_tokenizer("byte_level").save_pretrained(hf)
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (hf / f"{name}.json").write_text(text)
        copy_tokenizer(hf, converted)
        return AutoTokenizer.from_pretrained(converted)

    return load


LLAMA = {"model_type": "llama"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {2}),
        ({"generation_config": {"eos_token_id": [4, 7]}}, {2, 4, 7}),
        ({"generation_config": {"eos_token_id": 4}, "config": LLAMA | {"eos_token_id": 9}}, {2, 4, 9}),
        ({"config": LLAMA | {"eos_token_id": [9, 2]}, "generation_config": {}}, {2, 9}),
        ({"config": LLAMA | {"eos_token_id": None, "text_config": {"eos_token_id": 5}}}, {2, 5}),
        ({"config": LLAMA | {"eos_token_id": -1}}, {2}),
    ],
)
def test_the_tokenizers_and_both_configurations_end_tokens_count(load, files, expected):
    assert set(end_tokens(load(files))) == expected


@pytest.mark.parametrize("value", ["2", [[2]], True, 2.5, {"a": 1}])
def test_what_is_no_token_id_is_refused_with_the_file_and_the_key(load, value):
    tokenizer = load({"generation_config": {"eos_token_id": value}})
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id is .*a token id or a list"):
        end_tokens(tokenizer)


def test_a_file_that_is_not_json_is_named(load):
    tokenizer = load({"generation_config": "{"})
    with pytest.raises(ValueError, match="generation_config.json: not JSON"):
        end_tokens(tokenizer)


def test_questions_of_an_evaluation_end_at_each_of_them(load):
    sample = Sample(
        id="1", task="t", length=9, seed=0, index=0, context="a", query="the", answer_prefix="",
        references=(), depth=None, num_tokens_to_generate=4,
    )  # fmt: skip
    request = greedy_request(
        load({"generation_config": {"eos_token_id": [4]}}), sample, StarConfig(), chat=False
    )
    assert set(request.all_end_tokens) == {2, 4}


def test_a_stop_text_that_is_a_special_token_ends_an_answer_at_that_token():
    tokenizer = small_tokenizer("byte_level")
    assert stop_tokens(tokenizer, ["the", "<|im_end|>", "<|im_end|>\n", "</s>"]) == (4, 2)
