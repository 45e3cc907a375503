"""How much a command may hold: on a CPU as is fastest, and never so much that sequences wait too long.

What a running sequence waits for between two tokens is one command: the step that makes its own token, the
queries of sequences that begin, and a wave of a context. The first cannot be helped. Queries and waves are
cut so that all of it stays within the longest wait, at the speed that commands really have: on a busy
machine, that is another one than on an idle one.
"""

import math
import sys

SMALLEST_WAVE_TOKENS = 32
WAVE_SHARE, QUERY_SHARE = 0.5, 0.25
"""Of the longest wait without decoding; the rest is for a machine that becomes slower meanwhile."""
SMALLEST_TIME_SHARE = 0.1
"""Of the longest wait: so much is left for waves and queries, however long decoding takes."""
FEWEST_QUERY_TOKENS = 16
FEWEST_MEASURED_TOKENS = 64
"""With fewer, a command takes as long as reading the weights, and says nothing about a token's cost."""
CPU_WAVE_TOKENS = 2048
"""Of a rank without a GPU. With more, activations exceed 32 MB, which glibc maps anew each time."""


def largest_wave_tokens(device_type: str) -> int:
    """Tokens of a rank in one forward pass beyond which it becomes slower, on a `cpu` or `cuda` device."""
    return CPU_WAVE_TOKENS if device_type == "cpu" else sys.maxsize


class Pace:
    """Learns how long commands take, and bounds waves and queries to the longest wait that is allowed.

    Attributes:
        seconds_per_cost: of encoding and of queries; None until the first was measured.
        decode_seconds: of a command that only decodes.
    """

    def __init__(self, max_wait_seconds: float = math.inf, largest_wave_tokens: int = sys.maxsize) -> None:
        self.max_wait_seconds = max_wait_seconds
        self.largest_wave_tokens = largest_wave_tokens
        self.seconds_per_cost: float | None = None
        self.decode_seconds = 0.0

    def note_decoding(self, seconds: float) -> None:
        """A command that only decoded took so long."""
        self.decode_seconds = _slow_at_once(self.decode_seconds, seconds)

    def note(self, cost: float, seconds: float, *, decoded: bool = False) -> None:
        """A wave and queries of this cost, on the slowest rank, took so long.

        decoded: running sequences had their tokens in the same command.
        """
        if cost <= 0:
            return
        latest = max(0.0, seconds - decoded * self.decode_seconds) / cost
        known = self.seconds_per_cost
        self.seconds_per_cost = latest if known is None else _slow_at_once(known, latest)

    def most_query_tokens(self, cost_per_token: float, *, beside_wave: bool) -> int:
        """How many query tokens may be in a command in which running sequences have their tokens, too."""
        share = QUERY_SHARE if beside_wave else QUERY_SHARE + WAVE_SHARE
        bound = self._most_cost(share) / cost_per_token
        return max(FEWEST_QUERY_TOKENS, int(min(bound, sys.maxsize)))

    def most_wave_cost(self) -> float:
        """What a wave may cost on its slowest rank."""
        return self._most_cost(WAVE_SHARE)

    def _most_cost(self, share: float) -> float:
        if not self.seconds_per_cost:
            return math.inf
        left = max(self.max_wait_seconds - self.decode_seconds, SMALLEST_TIME_SHARE * self.max_wait_seconds)
        return share * left / self.seconds_per_cost


def _slow_at_once(known: float, latest: float) -> float:
    """What is slower counts at once, what is faster by and by."""
    return max(latest, 0.8 * known + 0.2 * latest)
