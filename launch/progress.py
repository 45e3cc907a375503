"""Progress of a batch for a person: a bar on a terminal, a plain line now and then in a log."""

import sys
from time import monotonic

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 5.0


class ConsoleProgress:
    """Shows how many context tokens are encoded, then how many tokens are generated. See `Progress`."""

    def __init__(self, num_context_tokens: int) -> None:
        self.num_context_tokens, self.encoded, self.num_generated = num_context_tokens, 0, 0
        self.last_line = monotonic()
        self.bar = tqdm(
            total=num_context_tokens,
            unit="token",
            desc="context",
            disable=not sys.stderr.isatty(),
            leave=False,
        )

    def encoding(self, num_tokens: int) -> None:
        """See `Progress`."""
        self.encoded += num_tokens
        self.bar.update(num_tokens)
        self._log(f"encoded {self.encoded} of {self.num_context_tokens} context tokens")

    def generated(self, num_tokens: int) -> None:
        """See `Progress`."""
        self.num_generated += num_tokens
        self.bar.set_postfix_str(f"{self.num_generated} tokens generated")
        self._log(f"generated {self.num_generated} tokens")

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()

    def _log(self, line: str) -> None:
        if self.bar.disable and monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = monotonic()
            print(line, file=sys.stderr, flush=True)
