"""What agents and their libraries ask of a running server."""

import httpx
import pytest
from transformers import AutoTokenizer

DOCUMENT = "Anna lives in Lisbon. Karl lives in Oslo. " * 120
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "where_is", "arguments": '{"person": "Anna"}'},
}
QUESTION = [{"role": "system", "content": DOCUMENT}, {"role": "user", "content": "Where is Anna?"}]
AFTER_A_CALL = [
    *QUESTION,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "In Lisbon, of late. " * 60},
]


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2[0])


@pytest.fixture
def post(server):
    def send(path: str, **fields) -> httpx.Response:
        return httpx.post(server.url + path, json=fields, timeout=60)

    return send


def chat(post, messages: list[dict], **fields) -> dict:
    answer = post("/v1/chat/completions", model="smollm2", messages=messages, max_tokens=4, top_k=1, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_agents_next_turn_finds_its_context_encoded(post):
    asked, called = (chat(post, messages)["usage"]["star"] for messages in (QUESTION, AFTER_A_CALL))
    again = chat(post, [*AFTER_A_CALL, {"role": "assistant", "content": "Lisbon."}, QUESTION[1]])["usage"][
        "star"
    ]
    assert asked["split"] == "last_message"
    assert called["cached_tokens"] == asked["context_tokens"] > 1000
    assert again["cached_tokens"] == called["context_tokens"] > asked["context_tokens"]


def test_an_answer_goes_on_with_what_was_begun(post):
    begun = [{"role": "user", "content": "Count to nine."}, {"role": "assistant", "content": "1, 2, 3, 4,"}]
    answer = chat(post, begun, continue_final_message=True, add_generation_prompt=False)
    assert answer["choices"][0]["message"]["content"].startswith(" 5")


@pytest.mark.parametrize("special", [True, False, None])
def test_a_text_has_the_tokens_of_transformers(post, tokenizer, special):
    text = "Hello, 漢字 <|im_end|>\n"
    answer = post("/tokenize", prompt=text, add_special_tokens=special, return_token_strs=True).json()
    assert answer["tokens"] == tokenizer.encode(text, add_special_tokens=special is not False)
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 8192
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(answer["tokens"])
    assert post("/detokenize", model="smollm2", tokens=answer["tokens"]).json() == {"prompt": text}


def test_messages_have_the_tokens_of_the_chat_template(post, tokenizer):
    answer = post("/tokenize", model="smollm2", messages=QUESTION, chat_template_kwargs={"any": 1}).json()
    assert (
        answer["tokens"] == tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    )
    assert answer["token_strs"] is None
    assert answer["count"] == chat(post, QUESTION)["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "fields", "reason"),
    [
        ("/tokenize", {}, "prompt: give either this or messages"),
        ("/tokenize", {"prompt": "x", "messages": QUESTION}, "prompt: give either this or messages"),
        ("/tokenize", {"prompt": "x", "continue_final_message": True}, "_final_message: it needs messages"),
        ("/tokenize", {"prompt": "x", "model": "y"}, "model: there is no 'y' here"),
        ("/tokenize", {"prompt": "a" * 1_000_000}, "has more tokens than the model's limit"),
        ("/tokenize", {"prompt": "x", "more": 1}, "more: there is no such field"),
        ("/detokenize", {"tokens": [1, 49152]}, "tokens: 49152 is no id of the tokenizer"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [1] * 8193}, "tokens: it has 8193 parts; the limit is 8192"),
    ],
)  # fmt: skip
def test_what_has_no_tokens_or_no_text_is_refused_by_name(post, path, fields, reason):
    answer = post(path, **fields)
    assert answer.status_code == (404 if "model" in fields else 400)
    assert reason in answer.json()["message"]
