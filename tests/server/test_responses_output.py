"""An answer's items and events, as the openai client's own types know them."""

import pytest
from openai.types.responses import ResponseOutputItem, ResponseStreamEvent
from pydantic import TypeAdapter

from megatron_star.server.wires.responses_output import Output

EVENT, ITEM = TypeAdapter(ResponseStreamEvent), TypeAdapter(ResponseOutputItem)
LOGPROBS = [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]


def call(index: int, name: str = "", arguments: str = "") -> dict:
    function = {"name": name, "arguments": arguments} if name else {"arguments": arguments}
    return {"tool_calls": [{"index": index, "function": function} | ({"id": f"c{index}"} if name else {})]}


DELTAS = [
    {"role": "assistant", "content": ""},
    {"reasoning_content": "let me "},
    {"reasoning_content": "see"},
    {"content": "Hel"},
    {"content": "lo"},
    call(0, "f"),
    call(0, arguments='{"a":'),
    call(0, arguments=" 1}"),
    call(1, "g", "{}"),
    {},
]
WHOLE = {
    "role": "assistant",
    "content": "Hello",
    "reasoning_content": "let me see",
    "tool_calls": [
        {"id": "c0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "c1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ],
}


def events_of(output: Output, deltas: list[dict], status: str = "completed") -> list[dict]:
    found = [event for delta in deltas for event in output.add(delta, [])] + list(output.end(status))
    return [event | {"sequence_number": number} for number, event in enumerate(found)]


def without_ids(items: list[dict]) -> list[dict]:
    return [{name: value for name, value in item.items() if name != "id"} for item in items]


def test_every_event_is_one_that_the_client_knows():
    for event in events_of(Output(), DELTAS):
        EVENT.validate_python(event)


def test_a_stream_tells_the_same_as_a_whole_answer():
    streamed, whole = Output(), Output()
    events_of(streamed, DELTAS)
    events_of(whole, [WHOLE])
    assert without_ids(streamed.items) == without_ids(whole.items)
    assert [item["type"] for item in whole.items] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert all(ITEM.validate_python(item).status == "completed" for item in whole.items)


def test_what_is_added_to_an_item_is_what_is_in_it_at_the_end():
    for kind, field in (
        ("output_text", "text"),
        ("reasoning_text", "text"),
        ("function_call_arguments", "arguments"),
    ):
        events = events_of(Output(), DELTAS)
        deltas: dict[int, str] = {}
        for event in events:
            if event["type"] == f"response.{kind}.delta":
                deltas[event["output_index"]] = deltas.get(event["output_index"], "") + event["delta"]
            elif event["type"] == f"response.{kind}.done":
                assert deltas.pop(event["output_index"]) == event[field]
        assert not deltas


def test_every_item_opens_and_closes_once_and_in_order():
    events = events_of(Output(), DELTAS)
    edges = [event for event in events if event["type"].startswith("response.output_item")]
    assert [(e["type"].rpartition(".")[2], e["output_index"]) for e in edges] == [
        (edge, index) for index in range(4) for edge in ("added", "done")
    ]
    # What an event said of an item stays as it was, while the item goes on.
    assert all(edge["item"]["status"] == "in_progress" for edge in edges[::2])
    assert edges[2]["item"]["content"] == []


@pytest.mark.parametrize("status", ["completed", "incomplete"])
def test_an_answer_of_nothing_is_an_empty_message(status):
    output = Output()
    events_of(output, [{}], status)
    (item,) = output.items
    assert (item["status"], item["content"][0]["text"]) == (status, "")


def test_log_probabilities_go_with_their_text():
    output = Output()
    events = [*output.add({"content": "a"}, LOGPROBS), *output.add({"content": "b"}, LOGPROBS)]
    events += output.end("completed")
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [delta["logprobs"] for delta in deltas] == [LOGPROBS, LOGPROBS]
    assert output.items[0]["content"][0]["logprobs"] == LOGPROBS * 2
