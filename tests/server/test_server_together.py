"""Many clients at once get what each would get alone."""

from concurrent.futures import ThreadPoolExecutor

CONTEXTS = ["The sky is blue and the grass is green. " * 20, "Ten men went to mow a meadow. " * 12]


def mixed_requests(count: int) -> list[tuple[str, str, dict]]:
    """Method, path and body: both wires, greedy and seeded, with contexts and without."""
    requests = []
    for index in range(count):
        tokens = 2 + index % 5
        sampling = {"temperature": 0} if index % 3 else {"temperature": 0.9, "top_p": 0.8, "seed": index}
        if index % 4 == 0:
            chosen = {"top_k": 1} if index % 3 else {"top_p": 0.8, "random_seed": index}
            body = {"prompts": [f"{index} men"], "tokens_to_generate": tokens, **chosen}
            requests.append(("PUT", "/api", body | {"contexts": [CONTEXTS[index % 8 // 4]]}))
        elif index % 4 == 1:
            body = {"model": "smollm2", "prompt": f"{index} plus one is", "max_tokens": tokens, **sampling}
            requests.append(("POST", "/v1/completions", body))
        elif index % 4 == 2:
            message = {"role": "user", "content": f"{CONTEXTS[1]}##What is {index}?"}
            body = {"messages": [message], "max_completion_tokens": tokens, "star": {"separator": "##"}}
            requests.append(("POST", "/v1/chat/completions", {"model": "smollm2", **body, **sampling}))
        else:
            body = {"prompt": CONTEXTS[0] + str(index), "max_tokens": tokens, "star": {"query_tokens": 3}}
            requests.append(("POST", "/completions", body | sampling))
    return requests


def answer_of(path: str, body: dict) -> str:
    """The text of any wire's answer."""
    if path == "/api":
        return body["text"][0]
    choice = body["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_64_clients_at_once_get_what_each_gets_alone(server):
    requests = mixed_requests(64)

    def ask(request):
        method, path, body = request
        answer = (server.put if method == "PUT" else lambda b: server.post(path, b))(body)
        assert answer.status_code == 200, answer.text
        return answer_of(path, answer.json())

    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, requests))
    alone = [ask(request) for request in requests[::3]]

    assert together[::3] == alone
