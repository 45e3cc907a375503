"""A rank whose main thread waits in C++ for a rank that never comes: `deaf_rank.py`."""

from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from megatron_star.job.interrupts import heeded_interrupts

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
with heeded_interrupts():
    # Python sees an interrupt that comes before the wait has begun; this rank waits all the same.
    while True:
        with suppress(KeyboardInterrupt):
            print("ready", flush=True)
            store.wait(["what nobody sets"], timedelta(minutes=10))
