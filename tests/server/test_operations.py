"""What those who run the server, and the programs between it and its clients, rely on."""

import json
import re
from types import SimpleNamespace

import httpx
import pytest
from running_server import wait_for
from starlette.testclient import TestClient

import megatron_star
from megatron_star.server.app import create_app
from megatron_star.server.keys import ApiKey, KeyRing
from megatron_star.server.metrics import ServerMetrics
from megatron_star.server.request_id import LONGEST_REQUEST_ID
from megatron_star.server.settings import ServerSettings
from megatron_star.server.state import ServerState

KEY = {"Authorization": "Bearer right-key"}
RIGHT_KEYS = KeyRing([ApiKey.of("right-key", name="default")])
APP, OTHER = "https://app.example", "https://other.example"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


def client(state: ServerState | None = None, **settings) -> TestClient:
    """Of an application of its own, which answers what needs no model."""
    # Nothing that is asked here touches the service.
    state = state or ServerState(service=object())
    app = create_app(ServerSettings(model_name="m", **settings), state, ServerMetrics())
    return TestClient(app, base_url="http://localhost:5000")


def allowed(response) -> str | None:
    return response.headers.get("access-control-allow-origin")


def test_a_stranger_leaves_no_trace():
    noted = []
    traces = SimpleNamespace(note=noted.append)
    settings = ServerSettings(model_name="m", keys=RIGHT_KEYS)
    asking = TestClient(create_app(settings, ServerState(service=object()), ServerMetrics(), traces))
    for headers in ({}, KEY):
        asking.post("/nowhere", headers=headers)
    assert [(request.status, request.route) for request in noted] == [(404, "other")]


def test_the_version_is_said_to_those_who_have_the_key():
    with_key = client(keys=RIGHT_KEYS)
    assert with_key.get("/version", headers=KEY).json() == {"version": megatron_star.__version__}
    assert with_key.get("/version").status_code == 401


def test_ping_says_what_health_says_without_a_key_and_by_get_and_post():
    loading = client(ServerState(), keys=RIGHT_KEYS)
    for answer in (loading.get("/ping"), loading.post("/ping", content=b"x"), loading.get("/health")):
        assert (answer.status_code, answer.json()["status"]) == (503, "loading")


@pytest.mark.parametrize("given", ["a", "run-7/step:3", "x" * LONGEST_REQUEST_ID, "a+b=c@d.e_f"])
def test_the_clients_request_id_is_taken_over(given):
    assert client().get("/version", headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * (LONGEST_REQUEST_ID + 1), 'a"b', "é", "a;b", "{a}"])
def test_a_request_id_that_cannot_be_shown_anywhere_is_replaced(given):
    def name() -> str:
        answer = asking.get("/version", headers={"X-Request-Id": given.encode("latin-1")})
        return answer.headers["x-request-id"]

    asking = client()
    assert re.fullmatch("[0-9a-f]{32}", name()) and name() != name()


def test_pages_of_others_get_no_leave_unless_they_are_named():
    for nobody in (client(), client(keys=RIGHT_KEYS)):
        assert allowed(nobody.get("/version", headers=KEY | {"Origin": APP})) is None
        assert nobody.options("/version", headers=PREFLIGHT | {"Origin": APP}).status_code in (401, 403)


@pytest.mark.parametrize("key", [{}, {"keys": RIGHT_KEYS}], ids=["no key", "a key"])
def test_a_page_that_is_named_may_ask_and_read_what_it_is_refused_for(key):
    named = client(allowed_origins=(APP,), **key)
    preflight = named.options("/v1/completions", headers=PREFLIGHT | {"Origin": APP})
    assert (preflight.status_code, allowed(preflight)) == (200, APP)
    assert preflight.headers["access-control-allow-headers"] == "authorization"

    answer = named.get("/version", headers=KEY | {"Origin": APP})
    assert (answer.status_code, allowed(answer)) == (200, APP)
    refused = named.put("/version", headers=KEY | {"Origin": APP})
    assert (refused.status_code, allowed(refused)) == (405, APP)
    if key:
        assert named.get("/version", headers={"Origin": APP}).status_code == 401


def test_another_page_gets_no_leave_and_without_a_key_no_answer_either():
    for key, status in (({}, 403), ({"keys": RIGHT_KEYS}, 200)):
        named = client(allowed_origins=(APP,), **key)
        answer = named.get("/version", headers=KEY | {"Origin": OTHER})
        assert (answer.status_code, allowed(answer)) == (status, None)
        assert allowed(named.options("/version", headers=PREFLIGHT | {"Origin": OTHER})) is None


def test_a_page_that_is_named_cannot_give_this_machine_another_name():
    named = client(allowed_origins=(APP,))
    assert named.get("/version", headers={"Origin": APP, "Host": "evil.example"}).status_code == 403


def test_with_a_key_every_page_may_be_let_in_and_without_one_that_is_refused():
    everybody = client(allowed_origins=("*",), keys=RIGHT_KEYS)
    assert allowed(everybody.get("/version", headers=KEY | {"Origin": OTHER})) == "*"
    with pytest.raises(ValueError, match="without an API key, every page could use the server"):
        ServerSettings(model_name="m", allowed_origins=("*",))


@pytest.mark.parametrize(
    "origin",
    [
        "app.example",
        "https://app.example/",
        "https://APP.example",
        "https://a@app.example",
        "https://",
        "null",
    ],
)
def test_what_is_no_origin_as_browsers_send_it_is_refused_by_name(origin):
    with pytest.raises(ValueError, match="allowed origin '.*': it must be as https://app.example"):
        ServerSettings(model_name="m", allowed_origins=(origin,))


def test_ports_and_addresses_are_origins():
    ServerSettings(model_name="m", allowed_origins=("http://localhost:3000", "http://[::1]:80", "app://a"))


def test_behind_a_proxys_path_the_description_says_where_the_server_is():
    behind = client(root_path="/star", keys=RIGHT_KEYS)
    assert behind.get("/openapi.json", headers=KEY).json()["servers"] == [{"url": "/star"}]
    assert behind.get("/version", headers=KEY).status_code == 200
    for wrong in ("star", "/star/", "/", "/a b"):
        with pytest.raises(ValueError, match="root_path is"):
            ServerSettings(model_name="m", root_path=wrong)


def test_a_name_of_the_model_may_be_there_once():
    with pytest.raises(ValueError, match="model names a, b, a: each may be there once"):
        ServerSettings(model_name="a", more_model_names=("b", "a"))


def test_while_proxies_are_given_notice_requests_are_taken_and_each_answer_is_the_last_of_its_connection():
    state = ServerState(service=object())
    asking = client(state)
    assert "connection" not in asking.get("/version").headers
    state.leaving = True
    answer = asking.get("/version")
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    state.draining = True
    refused = asking.get("/version")
    assert (refused.status_code, refused.headers["connection"]) == (503, "close")


COMPLETION = {"model": "other-name", "prompt": "The capital of France is", "max_tokens": 1}


def test_any_name_of_the_model_is_taken_and_answers_have_the_first(server):
    models = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [(model["id"], model["root"], model["parent"]) for model in models] == [
        ("smollm2", "smollm2", None),
        ("other-name", "smollm2", None),
    ]
    assert models[1]["permission"][0]["allow_sampling"] is True
    assert httpx.get(f"{server.url}/v1/models/other-name").json() == models[1]
    assert server.post("/v1/completions", COMPLETION).json()["model"] == "smollm2"
    refused = server.post("/v1/completions", COMPLETION | {"model": "third"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")


@pytest.mark.parametrize(
    ("header", "in_body", "name"),
    [
        ("from-header", None, "from-header"),
        (None, "from:body", "from:body"),
        ("a/b", "c", "a/b"),
        ("é", "c", "c"),
    ],
)
def test_the_clients_name_of_a_request_is_in_the_answers_header_and_id_and_in_the_log(
    server, header, in_body, name
):
    headers = {} if header is None else {"X-Request-Id": header.encode("latin-1")}
    body = COMPLETION | ({} if in_body is None else {"request_id": in_body})
    answer = server.post("/v1/completions", body, headers=headers)
    assert (answer.headers["x-request-id"], answer.json()["id"]) == (name, f"cmpl-{name}")
    wait_for(lambda: f'"request_id": "{name}"' in server.log())


def test_a_name_in_the_body_that_is_not_safe_is_refused(server):
    for wrong in ("", "a b", "x" * (LONGEST_REQUEST_ID + 1), "a\n", "é"):
        refused = server.post("/v1/completions", COMPLETION | {"request_id": wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "request_id")


def test_every_chunk_of_a_stream_has_the_clients_name_of_the_request(server):
    chat = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 2,
        "stream": True,
    }
    answer = server.post("/v1/chat/completions", chat, headers={"X-Request-Id": "run-1"})
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-run-1"}
