"""A small part of odd_requests.py; the whole is a script, since it takes minutes."""

import httpx
from odd_requests import HUGE, resident_megabytes, send_all

NUM_REQUESTS = 120
KV_MEGABYTES = 50
MEGABYTES_PER_REQUEST = 0.25
"""A leak of more would be found."""
CHAT = {"model": "smollm2", "messages": [{"role": "user", "content": "Odd"}], "max_completion_tokens": 2}
MAKE_SOMETHING_ONCE = ({"response_format": {"type": "json_object"}}, {"prompt_logprobs": 2})
"""For all that follow: what the library of grammars knows of the tokens takes 24 MB, buffers of scores 14."""


def test_odd_requests_get_no_500_never_hang_and_leave_the_memory_flat(start):
    server = start("--star-kv-gigabytes", str(KV_MEGABYTES / 1000), "--star-block-size", "256")
    server.wait_until_ready()
    for fields in MAKE_SOMETHING_ONCE:
        assert server.post("/v1/chat/completions", CHAT | fields).status_code == 200
    for body in HUGE:  # the allocator keeps what the largest of them took
        headers = {"Content-Type": "application/json"}
        assert httpx.put(f"{server.url}/api", content=body(), headers=headers, timeout=60).status_code >= 400
    for seed in (1, 2):  # until contexts fill their budget, and each way of sampling was taken once
        send_all(server.url, NUM_REQUESTS, seed=seed)
    before = resident_megabytes(server.ranks[0].pid)
    findings = send_all(server.url, NUM_REQUESTS, seed=3)

    assert findings.broken == []
    assert findings.num_sent >= 0.8 * NUM_REQUESTS
    assert findings.statuses["400"] > NUM_REQUESTS / 4
    assert resident_megabytes(server.ranks[0].pid) - before < MEGABYTES_PER_REQUEST * NUM_REQUESTS
    assert "traceback" not in server.log()
