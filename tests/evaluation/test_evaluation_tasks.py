"""Samples hold what they ask for, where they say, at the length that was asked for, and always the same."""

import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from mutations import mutated
from transformers import AutoTokenizer

from megatron_star.evaluation.counting import DOTS
from megatron_star.evaluation.haystack import essay_directory
from megatron_star.evaluation.needles import NEEDLE_TASKS
from megatron_star.evaluation.sample import prompt_tokens
from megatron_star.evaluation.task_files import TaskFiles
from megatron_star.evaluation.tasks import GENERATED_TASKS, NamedTask, SampleKey, SampleMaker

NEEDLE = re.compile(r"One of the special magic (\w+) for ([\w-]+) is: ([\w-]+)\.")
LARGEST_UNIT = 40
"""Tokens of one needle with two uuids, one assignment, or three repetitions of a listed word."""


def num_tokens(maker: SampleMaker, sample) -> int:
    context, query = prompt_tokens(maker.tokenizer, sample, sample.context, chat=maker.chat)
    return len(context) + len(query) + sample.num_tokens_to_generate


@pytest.mark.parametrize("task", GENERATED_TASKS)
@pytest.mark.parametrize("length", [1200, 1237, 5000])
def test_a_sample_fills_the_length_but_for_less_than_one_more_unit(maker, make, task, length):
    used = num_tokens(maker, make(task, length))
    assert length - LARGEST_UNIT < used <= length


@pytest.mark.parametrize("task", GENERATED_TASKS)
def test_a_sample_does_not_depend_on_what_else_is_made(maker, make, essays, task):
    others = [make(task, index=index) for index in (3, 1)]
    fresh = SampleMaker(maker.tokenizer, TaskFiles(essay_folder=essays), chat=False)
    assert fresh.make(SampleKey(NamedTask.parse(task), 1500, 1)) == others[1]
    assert len({make(task, index=index, seed=seed).context for index in (0, 1) for seed in (0, 1)}) == 4


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_the_values_of_the_asked_keys_are_the_references_and_stand_in_the_context(make, task):
    sample = make(task)
    found = [(key, value) for _, key, value in NEEDLE.findall(sample.context) if re.search(key, sample.query)]
    assert sorted(value for _, value in found) == sorted(sample.references)
    assert not any(value in sample.query + sample.answer_prefix for value in sample.references)


NUM_NEEDLES = {
    "niah_single_1": 1,
    "niah_single_2": 1,
    "niah_single_3": 1,
    "niah_multikey_1": 4,
    "niah_multivalue": 4,
    "niah_multiquery": 4,
    "niah_multikey_1:keys=7": 7,
}


@pytest.mark.parametrize("task", NUM_NEEDLES)
def test_as_many_needles_are_hidden_as_the_task_says(make, task):
    assert len(NEEDLE.findall(make(task).context)) == NUM_NEEDLES[task]


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_a_haystack_of_needles_is_nothing_else_and_has_each_key_once(make, task):
    context = make(task, 3000).context
    keys = [key for _, key, _ in NEEDLE.findall(context)]
    assert len(keys) == len(set(keys)) == context.count("\n") - 1 > 30


def test_more_needles_than_pairs_of_words_still_have_different_keys(make, maker):
    keys = [key for _, key, _ in NEEDLE.findall(make("niah_multikey_2", 150_000).context)]
    assert len(keys) == len(set(keys)) > 8_000


@pytest.mark.parametrize("task", NEEDLE_TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.7, 1.0])
def test_a_needle_is_at_its_depth(make, task, depth):
    sample = make(task, 3000, depth=depth)
    place = sample.context.index(sample.references[0])
    assert sample.depth == depth
    assert place / len(sample.context) == pytest.approx(depth, abs=0.06)


def test_another_depth_moves_the_same_needle(make):
    samples = [make("niah_single_2", depth=depth) for depth in (0.2, 0.8)]
    assert samples[0].references == samples[1].references
    assert samples[0].id != samples[1].id


def test_a_needle_in_essays_stands_between_two_sentences(make):
    for index in range(5):
        before, _, after = make("niah_single_2", index=index).context.partition("One of the special")
        assert before.endswith((". ", "\n"))
        assert re.match(r" magic numbers for [\w-]+ is: \d{7}\. [A-Z]", after)


@pytest.mark.parametrize("task", ["variable_tracking", "variable_tracking:chains=3,hops=6"])
def test_the_traced_names_carry_the_asked_value_and_no_other_name_does(make, task):
    sample = make(task)
    (asked,) = set(re.findall(r"\d{5}", sample.query))
    values = {}
    for name, other, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", sample.context):
        values[name] = number or values[other]
    assert {name for name, value in values.items() if value == asked} == set(sample.references)
    assert len(sample.references) == (7 if "hops" in task else 5)
    assert len(set(values.values())) == (6 if "chains" in task else 2)  # of the example as well


@pytest.mark.parametrize(("length", "often", "seldom"), [(1200, 5, 1), (2500, 10, 1), (6000, 30, 3)])
def test_the_ten_common_words_are_the_most_common_ones(make, length, often, seldom):
    sample = make("common_words", length)
    listed = re.findall(r"\d+\. (\S+)", sample.context.rpartition("numbered list")[2])
    counts = Counter(listed)
    assert {word for word, count in counts.items() if count == often} == set(sample.references)
    assert set(counts.values()) == {often, seldom}


def test_a_list_longer_than_the_vocabulary_goes_on_with_pairs_of_words(make, maker):
    sample = make("common_words", 15_000)
    listed = Counter(re.findall(r"\d+\. (\S+)", sample.context.rpartition("numbered list")[2]))
    assert len(listed) > len(maker.files.essays.vocabulary)


@pytest.mark.parametrize("task", ["frequent_words", "frequent_words:alpha=1.5"])
def test_the_frequent_words_are_the_three_most_frequent_after_the_dots(make, task):
    text = make(task, 1800).context.split("\n")[1].split()
    (dots, _), *others = Counter(text).most_common(5)
    assert dots == DOTS
    assert tuple(word for word, _ in others[:3]) == make(task, 1800).references
    assert others[2][1] > others[3][1]


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Town {i} has {i + 20} bridges.",
                    "qas": [
                        {"question": f"How many bridges has town {i}?", "answers": [{"text": f"{i + 20}"}]},
                        {"question": "Who knows?", "answers": []},
                    ],
                }
            ]
        }
        for i in range(60)
    ]
}
HOTPOTQA = [
    {
        "question": f"Which river is longer than river {i}?",
        "answer": f"River {i + 1}",
        "supporting_facts": [[f"First {i}", 0], [f"Second {i}", 0]],
        "context": [
            [f"{name} {i}", [f"{name} {i} is a river.", " It is long."]]
            for name in ("Zeroth", "First", "Second")
        ],
    }
    for i in range(30)
]


@pytest.fixture
def make_from_files(maker, essays, tmp_path):
    """A sample of the files above."""
    for name, content in (("squad", SQUAD), ("hotpotqa", HOTPOTQA)):
        (tmp_path / name).write_text(json.dumps(content))
    lines = [{"input": f"Mary went to room {i}.", "question": "Where?", "target": f"{i}"} for i in range(3)]
    (tmp_path / "babilong").write_text("\n".join(map(json.dumps, lines)))
    files = TaskFiles(essays, tmp_path / "squad", tmp_path / "hotpotqa", tmp_path / "babilong")
    of_files = replace(maker, files=files)
    return lambda task, length, index=0: of_files.make(SampleKey(NamedTask.parse(task), length, index))


def test_a_squad_question_stands_after_its_document_among_as_many_others_as_fit(make_from_files, maker):
    sample = make_from_files("squad", 400)
    town = re.search(r"town (\d+)", sample.query)[1]
    assert f"Town {town} has {sample.references[0]} bridges." in sample.context
    assert 380 < num_tokens(maker, sample) <= 400
    everything = make_from_files("squad", 100_000)
    assert everything.context.count("Document ") == 60


def test_a_hotpotqa_question_has_all_its_supporting_documents(make_from_files):
    sample = make_from_files("hotpotqa", 300)
    number = re.search(r"river (\d+)", sample.query)[1]
    assert f"First {number}\nFirst {number} is a river. It is long." in sample.context
    assert f"Second {number}\n" in sample.context
    assert sample.references == (f"River {int(number) + 1}",)


def test_babilong_is_taken_as_it_is_and_ends(make_from_files):
    assert make_from_files("babilong", 100, 2).context == "Mary went to room 2.\n"
    with pytest.raises(ValueError, match="has 3 samples, but sample 3 is asked for"):
        make_from_files("babilong", 100, 3)
    with pytest.raises(ValueError, match="babilong/30/0/0: 30 tokens are too few"):
        make_from_files("babilong", 30)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("niah_single_4", "no task 'niah_single_4': the tasks are niah_single_1"),
        ("niah_multikey_1:keys=x", "'keys=x': 'x' is not a number"),
        ("niah_multikey_1:haystack=noise", "what can be set is keys, values, queries"),
        ("niah_multikey_1:queries=5", "queries is 5: it must be from 1 to keys, 4"),
        ("niah_multivalue:values=0", "values is 0"),
        ("variable_tracking:hops=0", "hops is 0"),
        ("frequent_words:alpha=1", "alpha is 1.0"),
        ("frequent_words:alpha=1e9", "alpha is 1000000000.0: it must be from 1.01 to 6.0"),
        ("frequent_words:alpha=nan", "alpha is nan"),
        ("variable_tracking:hops=1000000000", "1 chains of 1000000000 hops: at most 10000 assignments fit"),
        ("niah_multikey_1:keys=1000000000", "1000000000 keys of 1 values: at most 10000 fit"),
        (
            "niah_single_1:num_tokens_to_generate=0",
            "num_tokens_to_generate is 0: it must be from",
        ),
    ],
)
def test_a_wrong_task_is_refused_by_name(task, message):
    with pytest.raises(ValueError, match=message):
        NamedTask.parse(task)


@pytest.mark.parametrize("task", ["squad", "hotpotqa", "babilong"])
def test_a_task_of_a_file_needs_the_file(make, task, tmp_path, maker):
    with pytest.raises(ValueError, match=f"needs a file: --{task} FILE"):
        make(task)
    for content, message in (
        ('[{"input": "x"}]', f"{tmp_path}/file.*(is missing|a valid dictionary)"),
        ('{"data": 3, "input": 3}', "file.*(the field 'data' is 3|a valid list|the field 'input' is 3)"),
        ("{", "file(, line 1)?: not JSON"),
    ):
        (tmp_path / "file").write_text(content)
        wrong = replace(maker, files=TaskFiles(**{task: tmp_path / "file"}))
        with pytest.raises(ValueError, match=message):
            wrong.make(SampleKey(NamedTask.parse(task), 1000, 0))


@pytest.mark.parametrize("task", ["squad", "hotpotqa", "babilong"])
def test_damaged_files_of_a_task_are_read_or_refused_by_name(tmp_path, maker, task):
    path, generator, refused = tmp_path / "file", random.Random(0), 0
    babilong = {"input": "Mary went to room 1.", "question": "Where?", "target": "1"}
    small = {"squad": {"data": SQUAD["data"][:1]}, "hotpotqa": HOTPOTQA[:2], "babilong": babilong}[task]
    for _ in range(300):
        path.write_bytes(mutated(json.dumps(small).encode(), generator))
        damaged = replace(maker, files=TaskFiles(**{task: path}))
        try:
            damaged.make(SampleKey(NamedTask.parse(task), 1000, 0))
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) or f"{task}/1000/0/0: " in str(error)
    assert refused > 100


def test_essays_of_a_few_words_are_refused_where_a_list_of_words_is_made(tmp_path, maker):
    (tmp_path / "a.txt").write_text("few words here and there")
    few = replace(maker, files=TaskFiles(essay_folder=tmp_path))
    with pytest.raises(ValueError, match="3 plain words: common_words needs 40"):
        few.make(SampleKey(NamedTask.parse("common_words"), 1000, 0))


def test_a_length_that_is_too_small_is_refused_with_what_is_needed(make):
    with pytest.raises(ValueError, match=r"niah_single_1/140/0/0: 140 tokens are too few: at least 1\d\d "):
        make("niah_single_1", 140)


@pytest.mark.smollm2
@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_3", "common_words"])
def test_with_a_real_tokenizer_and_chat_the_query_has_the_template_and_the_answers_beginning(smollm2, task):
    tokenizer = AutoTokenizer.from_pretrained(smollm2[0])
    maker = SampleMaker(tokenizer, TaskFiles(essay_folder=essay_directory()), chat=True)
    sample = maker.make(SampleKey(NamedTask.parse(task), 2048, 0))
    context, query = prompt_tokens(tokenizer, sample, sample.context, chat=True)
    assert 2048 - 110 < len(context) + len(query) + sample.num_tokens_to_generate <= 2048
    ending = f"{sample.query}<|im_end|>\n<|im_start|>assistant\n{sample.answer_prefix}"
    assert tokenizer.decode(query) == ending
    assert tokenizer.decode(context).endswith(sample.context)
