"""Renders chat templates of strangers: a program that reads calls from stdin, a line each, and answers so.

It is run by its path, in a process of its own, and imports nothing of this package: it must start soon, and
whatever a template makes of it is lost with it.
"""

import json
import resource
import signal
import sys
from time import process_time
from typing import Any, NoReturn

from transformers.utils.chat_template_utils import render_jinja_template

MORE_BYTES = 1 << 30
"""Of address space, beside what the process has when it begins."""
MOST_CHARACTERS = 1 << 25


def limit_memory() -> None:
    """From now on, templates have so much."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def answer(call: dict[str, Any]) -> dict[str, Any]:
    """The text that a template writes, or what is wrong with it, and of what type that is."""
    variables, seconds = call.pop("variables"), call.pop("seconds")
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        text = render_jinja_template(**call, **variables)[0][0]
        signal.setitimer(signal.ITIMER_PROF, 0)
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"it writes {len(text)} characters; the limit is {MOST_CHARACTERS}")
    except (Exception, MemoryError) as error:  # whatever goes wrong in there is the template's fault
        return {"error": str(error)[:300] or type(error).__name__, "type": type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"text": text}


def stop(*_: object) -> NoReturn:
    """When a template's time is over."""
    raise TimeoutError("its time is over")


def main() -> None:
    """Until stdin ends."""
    signal.signal(signal.SIGPROF, stop)
    limit_memory()
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        start = process_time()
        answered = answer(json.loads(line))
        print(json.dumps(answered | {"seconds": process_time() - start}), flush=True)


if __name__ == "__main__":
    main()
