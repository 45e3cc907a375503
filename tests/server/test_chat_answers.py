"""Answers with calls and reasoning, whole and as a stream, say the same."""

from types import SimpleNamespace

import pytest
from answer_texts import TEXTS, TOOLS

from megatron_star.engine.answer import NewToken
from megatron_star.server.ask import Generation
from megatron_star.server.tools.answer_parser import AnswerFormats
from megatron_star.server.tools.formats import CALL_FORMATS, REASONING_FORMATS
from megatron_star.server.tools.offer import Offer
from megatron_star.server.tools.tool_use import ToolUse
from megatron_star.server.wires.chat_answers import ChatAnswers

NO_TOKENIZER = SimpleNamespace(added_tokens_decoder={})


def answers_of(name: str, *, prompts: tuple[str, ...] = ("",), **offer) -> ChatAnswers:
    formats = AnswerFormats(
        next(known for known in CALL_FORMATS if name in known.names), REASONING_FORMATS[0]
    )
    use = ToolUse(formats, NO_TOKENIZER)
    reading = use.reading(Offer(tools=TOOLS, **offer), list(prompts))
    return ChatAnswers(SimpleNamespace(token_bytes=None), reading, logprobs=False)


def whole(answers: ChatAnswers, text: str, reason: str = "stop", index: int = 0) -> dict:
    answer = SimpleNamespace(tokens=[], logprobs=[], top=[], text=text, finish_reason=reason)
    return answers.choice(index, answer)


def streamed(answers: ChatAnswers, text: str, reason: str = "stop") -> list[dict]:
    chunks = [chunk for piece in text for chunk in answers.piece(0, NewToken(0, 0.0, piece, ()))]
    return chunks + answers.last(0, SimpleNamespace(finish_reason=reason))


def summed(chunks: list[dict]) -> dict:
    """As clients put a stream together."""
    message: dict = {"content": ""}
    for chunk in chunks:
        for name, value in chunk["delta"].items():
            if name != "tool_calls":
                message[name] = message.get(name, "") + value
                continue
            (call,) = value
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                assert call["function"]["arguments"] == "" and call["type"] == "function"
                calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
            else:
                assert "id" not in call and "name" not in call["function"]
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return message


def without_ids(message: dict) -> dict:
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return {"content": message["content"] or "", "calls": calls, "reasoning": message.get("reasoning")}


@pytest.mark.parametrize("name", TEXTS)
def test_a_stream_adds_up_to_the_whole_answer(name):
    for text, expected in TEXTS[name]:
        message = whole(answers_of(name), text)
        chunks = streamed(answers_of(name), text)
        assert without_ids(summed(chunks)) == without_ids(message["message"])
        calls = [(call["name"], call["arguments"]) for call in without_ids(message["message"])["calls"]]
        assert tuple(calls) == expected.calls
        assert message["finish_reason"] == ("tool_calls" if calls else "stop")
        assert chunks[-1]["finish_reason"] == message["finish_reason"]
        assert all(chunk["finish_reason"] is None for chunk in chunks[:-1])


def test_an_answer_that_is_calls_alone_has_no_content():
    text, _ = TEXTS["hermes"][0]
    message = whole(answers_of("hermes"), text)["message"]
    assert message["content"] is None and message["role"] == "assistant"
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert "tool_calls" not in whole(answers_of("hermes"), "Hello")["message"]


def test_an_answer_that_was_cut_off_says_so_though_it_has_a_call():
    text = '<tool_call>{"name": "now", "arguments": {"a": 1'
    answer = whole(answers_of("hermes"), text, "length")
    assert answer["finish_reason"] == "length" and answer["message"]["tool_calls"]
    assert streamed(answers_of("hermes"), text, "length")[-1]["finish_reason"] == "length"


def test_ids_of_calls_differ_and_are_nine_characters_where_mistrals_templates_want_that():
    for name, length in (("hermes", 29), ("mistral", 9)):
        text, _ = TEXTS[name][1]
        ids = [call["id"] for call in whole(answers_of(name), text)["message"]["tool_calls"]]
        assert len(set(ids)) == 2 and {len(value) for value in ids} == {length}
        assert ids[0].replace("_", "").isalnum()


def test_reasoning_has_both_names_or_none():
    text = "It is 2.</think>\n\nTwo."
    opened = {"prompts": ("assistant\n<think>\n",)}
    message = whole(answers_of("hermes", **opened), text)["message"]
    assert message["reasoning_content"] == message["reasoning"] == "It is 2."
    assert message["content"] == "Two."
    hidden = answers_of("hermes", **opened, with_reasoning=False)
    assert without_ids(summed(streamed(hidden, text))) == {"content": "Two.", "calls": [], "reasoning": None}
    assert whole(answers_of("hermes"), text)["message"]["content"] == text


def test_each_of_several_answers_is_read_on_its_own():
    answers = answers_of("hermes", prompts=("<think>", "<think>"))
    for index in (1, 0):
        message = whole(answers, "a</think>" + TEXTS["hermes"][0][0], index=index)["message"]
        assert message["reasoning"] == "a" and len(message["tool_calls"]) == 1


def test_without_a_format_tools_are_refused_and_answers_are_as_they_are():
    use = ToolUse(AnswerFormats(), NO_TOKENIZER)
    with pytest.raises(ValueError, match="--tool-call-parser names one"):
        use.generation(Generation(num_tokens=1), Offer(tools=TOOLS))
    reading = use.reading(Offer(), [""])
    answers = ChatAnswers(SimpleNamespace(token_bytes=None), reading, logprobs=False)
    pieces = [p for text in (" ", "a", "\n", "") for p in answers.piece(0, NewToken(0, 0.0, text, ()))]
    assert [piece["delta"]["content"] for piece in pieces] == [" ", "a", "\n"]
