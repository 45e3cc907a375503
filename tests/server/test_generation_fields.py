"""From a request's fields to what the engine is asked."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from small_tokenizers import small_tokenizer

from megatron_star.config import StarConfig
from megatron_star.server.ask import Ask, Filters, Generation, PlainPrompt, filters
from megatron_star.server.errors import RequestError
from megatron_star.server.service import CompletionService
from megatron_star.server.settings import ServerSettings
from megatron_star.server.star_options import StarOptions
from megatron_star.text.prompt import SplitPrompt


@pytest.fixture
def service():
    engine = SimpleNamespace(
        tokenizer=small_tokenizer("byte_level"),
        vocab_size=300,
        max_sequence_length=100,
        most_generated=lambda n: 100 - n,
    )
    metrics = SimpleNamespace(
        watch=lambda engine, each_expert: None,
        watch_contexts=lambda contexts: None,
        watch_keys=lambda usage: None,
    )
    return CompletionService(engine, ServerSettings(model_name="m"), metrics)


def requested(service, num_prompt_tokens: int, **fields):
    split = SplitPrompt([5] * (num_prompt_tokens - 1), [5], "last_tokens")
    return service.submission._request(split, StarConfig(), Generation(**fields), 0)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "fields", "expected"),
    [
        (95, {"num_tokens": 16, "cut_to_room": True}, 5),
        (10, {"num_tokens": 16, "cut_to_room": True}, 16),
        (10, {"num_tokens": 16, "cut_to_room": True, "min_tokens": 40}, 40),
        (95, {"num_tokens": 16}, 16),
        (100, {"num_tokens": 16, "cut_to_room": True}, 1),
    ],
)
def test_a_number_of_tokens_that_nobody_asked_for_is_cut_to_what_is_left(
    service, num_prompt_tokens, fields, expected
):
    request = requested(service, num_prompt_tokens, **fields)
    assert request.sampling.num_tokens_to_generate == expected
    fits = num_prompt_tokens + expected <= 100
    try:
        request.check(vocab_size=340, max_sequence_length=100)
        assert fits
    except ValueError as error:
        assert not fits and "the model's limit is 100" in str(error)


def test_end_tokens_are_the_models_unless_others_or_none_are_asked_for(service):
    assert requested(service, 9, num_tokens=1).all_end_tokens == (2,)
    assert requested(service, 9, num_tokens=1, more_end_tokens=(7,)).all_end_tokens == (2, 7)
    assert requested(service, 9, num_tokens=1, end_tokens=(5,)).all_end_tokens == (5,)
    assert requested(service, 9, num_tokens=1, end_tokens=()).all_end_tokens == ()
    assert requested(service, 9, num_tokens=1, stop=("<|im_end|>", "the")).all_end_tokens == (2, 4)


@pytest.mark.parametrize(
    ("top_k", "top_p", "zero_is_off", "expected"),
    [
        (None, None, False, (0, 0.0)),
        (-1, 1.0, False, (0, 0.0)),
        (5, 0.5, False, (5, 0.5)),
        (0, 0.0, False, (1, 0.0)),  # the smallest nucleus is the most likely token
        (5, 0.0, True, (5, 0.0)),
    ],
)
def test_what_is_off_is_off_and_both_filters_may_be_on(top_k, top_p, zero_is_off, expected):
    assert filters(top_k, top_p, zero_is_off=zero_is_off) == Filters(*expected)


@pytest.mark.parametrize(
    ("generation", "star", "field"),
    [
        ({"num_tokens": 4, "min_tokens": 5}, {}, "min_tokens"),
        ({"num_tokens": 4}, {"separator": "#"}, "star.separator"),
        ({"num_tokens": 400}, {}, None),
        ({"num_tokens": 4}, {"passed_keys": 3}, "star.passed_keys"),
    ],
)
def test_what_is_refused_after_parsing_has_status_400_and_its_field(service, generation, star, field):
    service.engine.submit = lambda request: request.check(vocab_size=340, max_sequence_length=100)
    submission = service.submission
    submission.settings = replace(submission.settings, star=StarConfig(anchor="recompute"))
    prompt = PlainPrompt(content="the user", field="prompt")
    asked = Ask(prompts=[prompt], star=StarOptions(**star), generation=Generation(**generation))

    async def answer() -> None:
        async with service.answer(asked):
            pass

    with pytest.raises(RequestError) as error:
        asyncio.run(answer())
    assert (error.value.status, error.value.field) == (400, field)
