"""Contexts as a resource, over a real server: encoded ahead, asked about, and gone when they are deleted."""

import json
import threading
from time import monotonic, sleep

import httpx
import openai
import pytest
from documents import PAGE, TEXT_OF_PAGE, pdf
from prometheus_client.parser import text_string_to_metric_families

MODEL = "smollm2"
DOCUMENT = "The grass is green. The sky is blue. The sun is yellow. Anna lives in Lisbon. " * 40
QUESTION = [{"role": "user", "content": "Where does Anna live?"}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none is needed", max_retries=0)


@pytest.fixture
def contexts(server):
    """Of this server, which has none afterwards."""
    with httpx.Client(base_url=f"{server.url}/v1", timeout=60) as own:
        yield own
        for context in own.get("/contexts").json()["data"]:
            own.delete(f"/contexts/{context['id']}")


def metric(server, name: str) -> float:
    """The sum over its labels."""
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    return sum(s.value for family in families for s in family.samples if s.name == f"megatron_star_{name}")


def wait_for(what, seconds: float = 30):
    """Until it is true; what it is then."""
    deadline = monotonic() + seconds
    while not (found := what()):
        assert monotonic() < deadline
        sleep(0.02)
    return found


def at_rest(server) -> tuple[float, float]:
    """Bytes of KV, and contexts that have some, when these are what they were a moment before."""
    before, now = None, (metric(server, "kv_bytes"), metric(server, "cached_contexts"))
    while before != now:
        sleep(0.3)
        before, now = now, (metric(server, "kv_bytes"), metric(server, "cached_contexts"))
    return now


def text_of(tag: str) -> str:
    """A document of this test alone."""
    return f"{tag}: {DOCUMENT}"


def test_a_chat_about_a_context_is_the_one_about_its_text_without_encoding_it(client, contexts):
    text = text_of("chat")
    made = contexts.post("/contexts", json={"text": text, "name": "grass", "wait": True})
    assert made.status_code == 201, made.text
    context = made.json()
    assert (context["status"], context["name"], context["for_chat"]) == ("encoded", "grass", True)
    assert context["encoded_tokens"] == context["tokens"] > 700
    assert context["blocks"] == context["tokens"] // 256 + 1 and context["kv_bytes"]["full"] > 0

    asked = {"model": MODEL, "temperature": 0, "max_tokens": 12, "logprobs": True}
    by_id = client.chat.completions.create(
        messages=QUESTION, extra_body={"context_id": context["id"]}, **asked
    )
    sent = [{"role": "user", "content": f"{text.strip()}###{QUESTION[0]['content']}"}]
    by_text = client.chat.completions.create(
        messages=sent, extra_body={"star": {"separator": "###"}}, **asked
    )

    star = by_id.usage.star
    assert star["cache_hit"] and star["split"] == "context_id" and star["context_tokens"] == context["tokens"]
    assert by_id.choices[0].message.content == by_text.choices[0].message.content
    assert by_id.usage.prompt_tokens == by_text.usage.prompt_tokens
    assert by_text.usage.star["cache_hit"] and by_text.usage.star["context_tokens"] == context["tokens"]
    logprobs = [
        [token.logprob for token in answer.choices[0].logprobs.content] for answer in (by_id, by_text)
    ]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


def test_a_conversation_goes_on_about_it_and_streams(client, contexts):
    made = contexts.post("/contexts", json={"text": text_of("turns"), "wait": True}).json()
    messages = [
        *QUESTION,
        {"role": "assistant", "content": "In Lisbon."},
        {"role": "user", "content": "Why?"},
    ]
    stream = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"context_id": made["id"]},
    )
    usage = list(stream)[-1].usage
    assert usage.star["cache_hit"] and usage.star["context_tokens"] == made["tokens"]
    assert usage.star["query_tokens"] > 20


def test_completions_of_both_wires_follow_it_with_the_tokens_of_sending_it(server, client, contexts):
    text = text_of("completions")
    made = contexts.post("/contexts", json={"text": text, "for_chat": False, "wait": True}).json()
    asked = {"model": MODEL, "prompt": ["Anna lives in", "The sky is"], "max_tokens": 5, "temperature": 0}
    sent = client.completions.create(**asked, extra_body={"contexts": [text.strip()]})
    found = client.completions.create(**asked, extra_body={"context_id": made["id"]})
    assert [choice.text for choice in found.choices] == [choice.text for choice in sent.choices]
    assert found.usage.prompt_tokens == sent.usage.prompt_tokens
    assert found.usage.star["cache_hit"] and sent.usage.star["cache_hit"]

    own = {"prompts": ["Anna lives in"], "tokens_to_generate": 5, "top_k": 1, "context_id": made["id"]}
    assert server.put(own).json()["text"][0].endswith(found.choices[0].text)
    own = {"prompt": "Anna lives in", "max_tokens": 5, "top_k": 1, "context_id": made["id"]}
    assert server.post("/completions", own).json()["choices"][0]["text"] == found.choices[0].text


def test_tokens_are_a_context_of_prompts_of_tokens(client, contexts):
    tokens = [100 + i % 300 for i in range(600)]
    made = contexts.post("/contexts", json={"tokens": tokens, "wait": True}).json()
    assert (made["tokens"], made["for_chat"]) == (600, False)
    asked = {"model": MODEL, "prompt": [7, 8, 9], "max_tokens": 2, "temperature": 0}
    usage = client.completions.create(**asked, extra_body={"context_id": made["id"]}).usage
    assert usage.star["cache_hit"] and usage.prompt_tokens == 603


def test_its_own_star_options_are_used_and_cannot_be_given_again(server, contexts):
    star = {"block_size": 300, "anchor_size": 100}
    made = contexts.post("/contexts", json={"text": text_of("star"), "star": star, "wait": True}).json()
    assert {name: made["sizes"][name] for name in star} == star
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 1, "context_id": made["id"]}
    found = server.post("/v1/chat/completions", body).json()["usage"]["star"]
    assert found["cache_hit"] and found["sizes"] == made["sizes"]
    for option in ({"block_size": 300}, {"query_tokens": 3}, {"separator": "?"}):
        refused = server.post("/v1/chat/completions", body | {"star": option})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == f"star.{next(iter(option))}"
    assert server.post("/v1/chat/completions", body | {"star": {"speculate": "off"}}).status_code == 200


def test_a_chat_with_another_beginning_is_right_but_not_ahead_and_one_that_was_foreseen_is(client, contexts):
    system = {"role": "system", "content": "Answer in one word."}
    made = [
        contexts.post("/contexts", json={"text": text_of("system"), "wait": True, **more}).json()
        for more in ({}, {"messages": [system]})
    ]
    for context, foreseen in zip(made, (False, True), strict=True):
        found = client.chat.completions.create(
            model=MODEL,
            messages=[system, *QUESTION],
            max_tokens=1,
            extra_body={"context_id": context["id"], "cache_salt": f"of its own {foreseen}"},
        )
        assert not found.usage.star["cache_hit"]
        found = client.chat.completions.create(
            model=MODEL, messages=[system, *QUESTION], max_tokens=1, extra_body={"context_id": context["id"]}
        )
        assert found.usage.star["cache_hit"] or not foreseen
        assert (found.usage.star["context_tokens"] == context["tokens"]) == foreseen


def test_it_is_answered_at_once_and_its_progress_is_streamed(server, contexts):
    text = text_of("progress") * 3
    made = contexts.post("/contexts", json={"text": text})
    assert made.status_code == 202 and made.json()["status"] in ("queued", "encoding")
    events = contexts.get(f"/contexts/{made.json()['id']}", params={"stream": True}).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    reports = [json.loads(event[6:]) for event in events[:-2] if event.startswith("data: ")]
    encoded = [report["encoded_tokens"] for report in reports]
    assert encoded == sorted(encoded) and encoded[-1] == reports[-1]["tokens"]
    assert reports[-1]["status"] == "encoded"
    assert contexts.get(f"/contexts/{made.json()['id']}").json() == reports[-1]
    assert contexts.get("/contexts").json()["data"] == [reports[-1]]


def test_deleted_it_is_unknown_and_its_memory_is_given_back_once_no_request_uses_it(server, client, contexts):
    before = at_rest(server)
    made = contexts.post("/contexts", json={"text": text_of("deleted"), "wait": True}).json()
    assert metric(server, "kept_contexts") == 1 and metric(server, "kept_contexts_bytes") > len(DOCUMENT)
    assert at_rest(server)[0] > before[0]
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=40,
        stream=True,
        extra_body={"context_id": made["id"], "ignore_eos": True},
    )
    chunks = iter(stream)
    next(chunks)
    assert contexts.delete(f"/contexts/{made['id']}").json() == {
        "id": made["id"],
        "object": "context",
        "deleted": True,
    }
    assert len(list(chunks)) > 30
    assert at_rest(server) == before
    assert metric(server, "kept_contexts") == 0
    for answer in (
        contexts.get(f"/contexts/{made['id']}"),
        contexts.delete(f"/contexts/{made['id']}"),
        server.post("/v1/chat/completions", {"model": MODEL, "messages": QUESTION, "context_id": made["id"]}),
        server.put({"prompts": ["a"], "context_id": "ctx_of_nobody"}),
    ):
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "context_id")


def test_of_two_with_the_same_text_one_stays_encoded_when_the_other_is_deleted(contexts):
    made = [
        contexts.post("/contexts", json={"text": text_of("twice"), "wait": True}).json() for _ in range(2)
    ]
    assert made[0]["id"] != made[1]["id"]
    contexts.delete(f"/contexts/{made[0]['id']}")
    sleep(0.2)
    assert contexts.get(f"/contexts/{made[1]['id']}").json()["status"] == "encoded"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (("a.txt", "Grüße, 漢字".encode(), "text/plain"), "Grüße, 漢字"),
        (("a.md", b"# Title\n\nwords", "text/markdown"), "# Title\n\nwords"),
        (("a.html", PAGE.encode(), "text/html"), TEXT_OF_PAGE),
        (("a.pdf", pdf("Anna lives in Lisbon.", "Karl in Oslo."), "application/pdf"), None),
    ],
)
def test_a_file_is_a_context_of_its_text(contexts, file, text):
    fields = {"wait": "true", "star": '{"mode": "exact"}', "for_chat": "false"}
    made = contexts.post("/contexts", files={"file": file}, data=fields)
    assert made.status_code == 201, made.text
    text = text or "Anna lives in Lisbon.\n\nKarl in Oslo."
    same = contexts.post(
        "/contexts", json={"text": text, "star": {"mode": "exact"}, "for_chat": False, "wait": True}
    )
    for name in ("tokens", "mode", "kv_bytes"):
        assert made.json()[name] == same.json()[name]
    assert made.json()["name"] == file[0] and made.json()["mode"] == "exact"


BOUNDARY = {"Content-Type": "multipart/form-data; boundary=b"}
HEAD = b'--b\r\nContent-Disposition: form-data; name="file"'
FORMS = {
    "file": ({"files": {"file": ("a.txt", b"\xff\xfe\xff")}}, "file"),
    "broken PDF": ({"files": {"file": ("a.pdf", b"%PDF-1.7 no")}}, "file"),
    "no file": ({"files": {"name": (None, "a")}}, None),
    "text beside the file": ({"files": {"file": b"a"}, "data": {"text": "b"}}, "text"),
    "unknown field": ({"files": {"file": b"a"}, "data": {"other": "1"}}, "other"),
    "no JSON": ({"files": {"file": b"a"}, "data": {"wait": "yes"}}, "wait"),
    "not a boolean": ({"files": {"file": b"a"}, "data": {"wait": "1"}}, "wait"),
    "two files": ({"files": [("file", b"a"), ("file", b"b")]}, "file"),
    "many fields": ({"files": {f"f{i}": (None, "1") for i in range(40)}}, None),
    "large field": ({"files": {"file": b"a"}, "data": {"name": "a" * 70_000}}, "name"),
    "empty file": ({"files": {"file": ("a.txt", b"  \n")}}, "text"),
    "no boundary": ({"content": b"a", "headers": {"Content-Type": "multipart/form-data"}}, "Content-Type"),
    "not a form": ({"content": b"no form", "headers": BOUNDARY}, None),
    "cut short": ({"content": HEAD + b"\r\n\r\na", "headers": BOUNDARY}, None),
    "many headers": ({"content": HEAD + b"\r\na: b" * 400 + b"\r\n\r\n\r\n--b--", "headers": BOUNDARY}, None),
    "text/plain": ({"content": b"a", "headers": {"Content-Type": "text/plain"}}, "Content-Type"),
    "nothing": ({"json": {}}, None),
    "both": ({"json": {"text": "a", "tokens": [1]}}, None),
    "white space": ({"json": {"text": " \n "}}, "text"),
    "user before": ({"json": {"text": "a", "messages": QUESTION}}, None),
    "tokens of a chat": ({"json": {"tokens": [1], "for_chat": True}}, "tokens"),
    "tokens beyond": ({"json": {"tokens": [1 << 30]}}, None),
    "too long": ({"json": {"text": "word " * 200_000}}, None),
    "query": ({"json": {"text": "a", "star": {"query_tokens": 3}}}, None),
    "ttl": ({"json": {"text": "a", "ttl_seconds": 0}}, "ttl_seconds"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_what_is_wrong_is_refused_by_name_and_nothing_is_kept(contexts, name):
    request, field = FORMS[name]
    answer = contexts.post("/contexts", **request)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field
    assert contexts.get("/contexts").json()["data"] == []


def test_prompts_that_cannot_follow_it_are_refused_by_name(server, contexts):
    text = contexts.post("/contexts", json={"text": "Anna lives in Lisbon."}).json()["id"]
    tokens = contexts.post("/contexts", json={"tokens": [1, 2, 3]}).json()["id"]
    completion, system = {"model": MODEL, "max_tokens": 1}, [{"role": "system", "content": "Hello"}]
    for path, body, field in (
        ("/v1/completions", completion | {"prompt": [1], "context_id": text}, "prompt"),
        ("/v1/completions", completion | {"prompt": "a", "context_id": tokens}, "prompt"),
        ("/v1/completions", completion | {"prompt": " ", "context_id": text}, "prompt"),
        ("/v1/completions", completion | {"prompt": "a", "contexts": ["b"], "context_id": text}, "contexts"),
        ("/v1/chat/completions", completion | {"messages": QUESTION, "context_id": tokens}, "context_id"),
        ("/v1/chat/completions", completion | {"messages": system, "context_id": text}, "messages"),
    ):
        answer = server.post(path, body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text


def test_no_text_of_it_is_in_the_log(server, contexts):
    secret = "xylophonequartz"
    contexts.post("/contexts", json={"text": f"{secret} " * 50, "name": secret, "wait": True})
    contexts.post("/contexts", files={"file": (f"{secret}.html", f"<p>{secret}".encode(), "text/html")})
    contexts.post("/contexts", files={"file": (f"{secret}.pdf", f"%PDF-{secret}".encode())})
    assert secret not in server.log()
    assert '"route": "/v1/contexts"' in server.log()


def test_bounds_dropped_contexts_and_ones_that_nobody_uses(start):
    small = start("--max-contexts", "2", "--max-context-bytes", "20K", "--star-kv-gigabytes", "0.07")
    small.wait_until_ready()
    with httpx.Client(base_url=f"{small.url}/v1", timeout=60) as contexts:
        large = contexts.post("/contexts", json={"text": "word " * 5000})
        assert large.status_code == 409 and "of 20,480" in large.json()["error"]["message"]
        first = contexts.post("/contexts", json={"text": text_of("first"), "wait": True}).json()
        second = contexts.post("/contexts", json={"text": text_of("second"), "wait": True}).json()
        assert contexts.post("/contexts", json={"text": "third"}).status_code == 409
        assert [c["id"] for c in contexts.get("/contexts").json()["data"]] == [first["id"], second["id"]]

        body = {"model": MODEL, "max_tokens": 1, "messages": QUESTION}
        fill = [threading.Thread(target=small.post, args=("/v1/chat/completions", body | {"messages": [
            {"role": "user", "content": text_of(f"other {i}") * 2}]})) for i in range(4)]  # fmt: skip
        for thread in fill:
            thread.start()
        for thread in fill:
            thread.join()
        dropped = contexts.get(f"/contexts/{first['id']}").json()
        assert (dropped["status"], dropped["encoded_tokens"], dropped["kv_bytes"]) == ("dropped", 0, {})
        hits = [
            small.post("/v1/chat/completions", body | {"context_id": first["id"]}).json()["usage"]["star"][
                "cache_hit"
            ]
            for _ in range(2)
        ]
        assert hits == [False, True]
        assert contexts.get(f"/contexts/{first['id']}").json()["status"] == "encoded"
        contexts.delete(f"/contexts/{second['id']}")
        third = contexts.post("/contexts", json={"text": "third", "ttl_seconds": 1}).json()
        wait_for(lambda: contexts.get(f"/contexts/{third['id']}").status_code == 404)
