"""Keeps one answer to its grammar. Masks are made in other threads, while a step runs on the device.

A mask is begun as soon as the token before it is kept, and those after proposals when these are fed. So they
are there when the logits come, or nearly.
"""

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from concurrent.futures import wait as wait_for

from torch import Tensor

from megatron_star.engine.grammar import GrammarError, Matcher

SECONDS_FOR_MASKS = 10.0
"""Of one step. llguidance's own limits end it long before; this is for what they do not bound."""


class Guide:
    """Used by the engine's thread, which only waits for masks. It raises nothing: an `error` ends the answer.

    Attributes:
        error: why the answer cannot go on, if so.
        is_over: nothing but an end token may follow.
        forced: tokens that are likely to come next, since the grammar leaves one text only; maybe none.
    """

    def __init__(self, matcher: Matcher, workers: Executor, *, proposes: bool) -> None:
        """
        Args:
            matcher: of nobody else.
            workers: threads that make masks; they begin in the order in which they are asked.
            proposes: whether `forced` is of use.
        """
        self._matcher, self._workers, self._proposes = matcher, workers, proposes
        self.error: str | None = None
        self.is_over = False
        self.forced: list[int] = []
        self._jobs: list[Future[list[Tensor]]] = []
        self.look_ahead()

    def accept(self, token: int) -> None:
        """The answer has this token more, which does not end it."""
        with _Noted(self):
            if not self._matcher.accept([token]):
                raise GrammarError(f"token {token} does not follow")
            self.is_over = self._matcher.is_over

    @property
    def may_end(self) -> bool:
        """The tokens so far are a whole answer; only between `masks` and `look_ahead`."""
        with _Noted(self):
            return self._matcher.may_end
        return False

    def look_ahead(self) -> None:
        """Begin the mask of the next token: after those that were accepted, no more come for now."""
        with _Noted(self):
            self.forced = self._matcher.forced() if self._proposes else []
            self._jobs = [self._workers.submit(self._mask)]

    def follow(self, proposals: Sequence[int]) -> None:
        """Begin the masks after each of these tokens, which are fed in the next step."""
        if proposals and not self.error:
            self._jobs.append(self._workers.submit(self._masks_after, self._jobs[0], proposals))

    def masks(self, num_rows: int) -> list[Tensor | None]:
        """Of the next token, and of those after proposals; None after one that the grammar forbids.

        That cannot be chosen, so nothing is made of the rows after it.
        """
        masks: list[Tensor] = []
        with _Noted(self):
            if wait_for(self._jobs, SECONDS_FOR_MASKS).not_done:
                raise GrammarError(f"it took more than {SECONDS_FOR_MASKS:.0f} s to know what may follow")
            masks = [mask for job in self._jobs for mask in job.result()]
        return [*masks, *[None] * (num_rows - len(masks))]

    def _mask(self) -> list[Tensor]:
        return [self._matcher.mask()]

    def _masks_after(self, before: Future[list[Tensor]], proposals: Sequence[int]) -> list[Tensor]:
        """`before` was begun earlier; the matcher is free when it is done."""
        before.result()
        masks = []
        for token in proposals:
            if not self._matcher.accept([token]):
                break
            masks.append(self._matcher.mask())
        self._matcher.rewind(len(masks))
        return masks


class _Noted:
    """Whatever is raised within is the guide's error, and goes no further: other answers go on."""

    def __init__(self, guide: Guide) -> None:
        self._guide = guide

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception):
            self._guide.error = f"the answer cannot follow its grammar: {error}"
        return isinstance(error, Exception)
