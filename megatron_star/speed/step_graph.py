"""A whole step of token generation as one CUDA graph: the host starts a token at once, not in 500 operations.

All that is new with a step is in one tensor on the device (`algorithm/step_inputs.py`). So a step that was
captured once runs a later one, after one copy into the tensor that it reads. Which steps are so alike, their
signature says: the contexts that rows attend to, and how many rows there are. Steps are filled up to 1, 2, 4,
.. rows, so that few graphs do for many numbers of sequences. The first steps of a signature run plain, which
compiles and loads what they need. Graphs share one pool of memory, since none runs beside another.

A graph knows contexts by weak references, and where their keys and values are. It is used only for a step
whose contexts are the same objects, which live, and is forgotten after one of them is dropped.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_star.algorithm.step_inputs import StepInputs

log = logging.getLogger(__name__)

MOST_ROWS = 64
"""Of a captured step: with more, the device takes longer for them than the host for starting them."""

MOST_GRAPHS = 16
"""That are kept, the least recently used going first. Each takes some MB, and room for its logits."""

NUM_PLAIN = 2
"""Steps of a signature that run plain before one is captured."""

NUM_PLAIN_AGAIN = 32
"""The same of a signature whose graph had to make way, so that many in turn do not capture all the time."""

MOST_COUNTED = 64
"""Signatures whose plain steps are counted."""

Run = Callable[[StepInputs], Tensor]


class Graph(Protocol):
    """As `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Start what was captured."""

    def pool(self) -> object:
        """Of its memory."""


class Recording(NamedTuple):
    """A captured step.

    Attributes:
        inputs: those that it reads.
        logits: those that it writes, [logit rows, vocab_size].
    """

    graph: Graph
    inputs: StepInputs
    logits: Tensor


class Recorder(Protocol):
    """How steps are captured."""

    def run(self, inputs: StepInputs, run: Run) -> Tensor:
        """Plain, but where the next `capture` takes place: what that needs is there afterwards."""

    def capture(self, inputs: StepInputs, run: Run, pool: object | None) -> Recording:
        """Without executing it; in the memory of this pool, or of a new one."""


class CudaRecorder:
    """Captures on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def run(self, inputs: StepInputs, run: Run) -> Tensor:
        """See `Recorder.run`."""
        current = torch.cuda.current_stream()
        _ = inputs.tensor  # later steps write to it on this stream
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            logits = run(inputs)
        current.wait_stream(self.stream)
        return logits.clone()  # in memory of the stream that reads it

    def capture(self, inputs: StepInputs, run: Run, pool: object | None) -> Recording:
        """See `Recorder.capture`."""
        graph, failure, current = torch.cuda.CUDAGraph(), None, torch.cuda.current_stream()
        # Other threads, such as one that writes files, may go on using the device meanwhile.
        captured = torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")
        try:
            with captured:
                try:
                    logits = run(inputs)
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            torch.cuda.set_stream(current)  # the end of a broken capture may not do it
            raise failure or error from None  # nor say what broke it
        finally:
            failure = None  # whose traceback holds contexts
        return Recording(graph, inputs, logits)


class StepGraphs:
    """The graphs of a model on one rank.

    Attributes:
        fills_up: whether steps have rows that stand for no token. Those of a model of experts have none: they
            would be sent to experts.
        num_captured, num_replayed: steps so far.
        error: why nothing is captured any more.
    """

    def __init__(self, recorder: Recorder, *, fills_up: bool = True) -> None:
        self.fills_up = fills_up
        self.num_captured = self.num_replayed = 0
        self.error: str | None = None
        self._recorder = recorder
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._num_missing: OrderedDict[Hashable, int] = OrderedDict()  # plain steps, before one is captured

    def filled(self, num_rows: int) -> int:
        """The number of rows that a step of so many is filled up to."""
        if not self.fills_up or self.error or not 1 <= num_rows <= MOST_ROWS:
            return num_rows
        return 1 << (num_rows - 1).bit_length()

    @torch.inference_mode()
    def run(self, inputs: StepInputs, run: Run) -> Tensor:
        """See `StarModel.run_step`."""
        self._forget_dropped()
        if self.error or not inputs.has_tables or inputs.shape.num_rows > MOST_ROWS:
            return run(inputs)
        key = self._key(inputs)
        if key in self._recordings:
            return self._replayed(key, inputs)
        num_missing = self._num_missing.pop(key, NUM_PLAIN)
        if num_missing == 0:
            return self._captured(key, inputs, run)
        self._note(key, num_missing - 1)
        return run(inputs)

    def _key(self, inputs: StepInputs) -> Hashable:
        """Python does the same in steps with the same; with experts it knows which rows are fillers."""
        return inputs.signature, None if self.fills_up else inputs.num_fed

    def _note(self, key: Hashable, num_missing: int) -> None:
        self._num_missing[key] = num_missing
        if len(self._num_missing) > MOST_COUNTED:
            self._num_missing.popitem(last=False)

    def _replayed(self, key: Hashable, inputs: StepInputs) -> Tensor:
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        recording.inputs.refill(inputs)
        recording.graph.replay()
        self.num_replayed += 1
        return recording.logits.clone()  # the next replay writes over them

    def _captured(self, key: Hashable, inputs: StepInputs, run: Run) -> Tensor:
        """A step that runs, and is captured besides. Where that fails, nothing is captured any more."""
        logits = self._recorder.run(inputs, run)
        pool = next((recording.graph.pool() for recording in self._recordings.values()), None)
        try:
            self._recordings[key] = self._recorder.capture(inputs, run, pool)
        except Exception as error:
            self.error = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            self._recordings.clear()
            log.warning("steps of token generation run without CUDA graphs from now on: %s", self.error)
            return logits
        self.num_captured += 1
        if len(self._recordings) > MOST_GRAPHS:
            oldest, _ = self._recordings.popitem(last=False)
            self._note(oldest, NUM_PLAIN_AGAIN)
        return logits

    def _forget_dropped(self) -> None:
        for key, recording in list(self._recordings.items()):
            if any(context() is None for context, _ in recording.inputs.runs):
                del self._recordings[key]
