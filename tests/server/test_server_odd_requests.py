"""A small part of odd_requests.py; the whole is a script, since it takes minutes."""

from odd_requests import resident_megabytes, send_all

NUM_REQUESTS = 120
KV_MEGABYTES = 50
MEGABYTES_PER_REQUEST = 0.25
"""A leak of more would be found."""


def test_odd_requests_get_no_500_never_hang_and_leave_the_memory_flat(start):
    server = start("--star-kv-gigabytes", str(KV_MEGABYTES / 1000), "--star-block-size", "256")
    server.wait_until_ready()
    for seed in (1, 2):  # until contexts fill their budget, and each way of sampling was taken once
        send_all(server.url, NUM_REQUESTS, seed=seed)
    before = resident_megabytes(server.ranks[0].pid)
    findings = send_all(server.url, NUM_REQUESTS, seed=3)

    assert findings.broken == []
    assert findings.num_sent >= 0.8 * NUM_REQUESTS
    assert findings.statuses["400"] > NUM_REQUESTS / 4
    assert resident_megabytes(server.ranks[0].pid) - before < MEGABYTES_PER_REQUEST * NUM_REQUESTS
    assert "traceback" not in server.log()
