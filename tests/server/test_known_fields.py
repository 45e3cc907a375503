"""What clients send that asks for nothing is accepted; what would change the answer is refused by name."""

import inspect

import pytest
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions
from openai.types.chat import ChatCompletionMessage
from pydantic import ValidationError

from megatron_star.server.wires.chat_schema import ChatRequest
from megatron_star.server.wires.completion_schema import CompletionRequest
from megatron_star.server.wires.megatron_schemas import MegatronCompletionRequest, MegatronGenerateRequest
from megatron_star.server.wires.message_schema import Message

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"model": "m", "prompt": "x"}
OF_THE_CLIENT_ITSELF = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "top_k": -1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "n": 1,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "stop": [],
    "stop_token_ids": [],
    "ignore_eos": False,
    "min_tokens": 0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "service_tier": "auto",
    "store": False,
    "metadata": {"run": "1"},
    "user": "me",
    "priority": 0,
}
NEUTRAL_IN_CHATS = {
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "none",
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "reasoning_effort": "none",
    "top_logprobs": 0,
    "logprobs": False,
    "echo": False,
    "add_generation_prompt": True,
    "chat_template_kwargs": {},
}


@pytest.mark.parametrize("field", [*NEUTRAL, *NEUTRAL_IN_CHATS])
def test_a_known_field_with_null_or_its_neutral_value_is_accepted(field):
    value = (NEUTRAL | NEUTRAL_IN_CHATS)[field]
    ChatRequest(**CHAT, **{field: value})
    ChatRequest(**CHAT, **{field: None})
    if field in NEUTRAL:
        CompletionRequest(**COMPLETION, best_of=1, **{field: value})
        CompletionRequest(**COMPLETION, best_of=None, **{field: None})


def test_every_field_that_the_openai_client_knows_may_be_null():
    for create, schema, required in (
        (ChatCompletions.create, ChatRequest, CHAT),
        (Completions.create, CompletionRequest, COMPLETION),
    ):
        names = inspect.signature(create).parameters.keys() - OF_THE_CLIENT_ITSELF
        schema(**dict.fromkeys(names) | required)


def test_every_field_of_a_message_that_the_client_knows_may_be_null():
    fields = dict.fromkeys(ChatCompletionMessage.model_fields) | {"role": "assistant", "content": "x"}
    assert Message(**fields).for_template() == {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("functions", [{"name": "f"}], r"only null or \[\] is supported here"),
        ("function_call", {"name": "f"}, 'only null or "none" or "auto"'),
        ("typical_p", 0.1, "only null or 1"),
        ("typical_p", True, "only null or 1"),
        ("logits_processors", ["x"], r"only null or \[\]"),
        ("response_format", {"type": "structural_tag"}, "'text', 'json_object' or 'json_schema'"),
        ("structural_tag", "{}", "only null is"),
        ("guided_decoding_backend", "outlines", "only null or"),
        ("prediction", {"type": "content"}, "only null is"),
    ],
)
def test_what_would_change_the_answer_is_refused(field, value, reason):
    with pytest.raises(ValidationError, match=reason):
        ChatRequest(**CHAT, **{field: value})


def test_best_of_is_as_many_as_are_returned_or_more_and_then_not_streamed():
    CompletionRequest(**COMPLETION, n=3, best_of=3, stream=True)
    assert CompletionRequest(**COMPLETION, n=2, best_of=3).num_best == 2
    with pytest.raises(ValidationError, match="best_of: it is 2, less than n, which is 3"):
        CompletionRequest(**COMPLETION, n=3, best_of=2)
    with pytest.raises(ValidationError, match="best_of: the best is known at the end only"):
        CompletionRequest(**COMPLETION, best_of=2, stream=True)


def test_megatrons_routes_know_neutral_values_too():
    MegatronCompletionRequest(prompt="x", max_tokens=1, min_p=0, repetition_penalty=1, stream=False)
    assert MegatronGenerateRequest(prompts=["x"], temperature=None, top_k=-1).temperature == 1.0
