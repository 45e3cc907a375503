"""A request on its way, from the checks to its end: what the scheduler needs, and the answer as it comes."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic

from torch import Tensor

from megatron_star.engine.answer_rules import AnswerRules
from megatron_star.engine.answer_text import AnswerText
from megatron_star.engine.attention_map import AttentionMap
from megatron_star.engine.guide import Guide
from megatron_star.engine.prompt_scores import PromptScores
from megatron_star.engine.request import StarRequest, StarResult, Timings
from megatron_star.engine.row_to_sample import Choice, RowToSample
from megatron_star.engine.sampling import uniform
from megatron_star.engine.scheduled_request import ScheduledRequest, Stage
from megatron_star.engine.token_rules import TokenRules
from megatron_star.planning.kv_memory import MOST_PROPOSED_TOKENS
from megatron_star.planning.planner import PlannedContext
from megatron_star.planning.sizes import sizes_of
from megatron_star.text.text_stream import Tokenizer


@dataclass(frozen=True)
class NewToken:
    """A token as it came.

    `text` is what it adds to the answer; a piece in which a stop string may begin comes with a later token.
    `top` are the likeliest tokens in its place with their log-probabilities, as many as the request asks for.
    """

    token: int
    logprob: float
    text: str
    top: tuple[tuple[int, float], ...]


class Answer(ScheduledRequest):
    """Streams `NewToken`s and ends with a `StarResult`; both may be waited for in any thread.

    Attributes:
        request: what was asked.
        cancelled: somebody called `cancel`.
        error, is_refused: see `StarResult`.
        ended: set when there is a result.
        num_encoded_tokens: context tokens that are encoded so far.
        prompt_scores: of context and query, where they are asked for; whole when there is a result.
        top: for each of `tokens`, see `NewToken`.
        guide: keeps it to its grammar, if it has one; whoever uses the answer sets it.
        num_proposed_tokens, num_accepted_tokens, attention_map: see `StarResult`.
    """

    def __init__(
        self,
        request_id: int,
        request: StarRequest,
        planned: PlannedContext,
        tokenizer: Tokenizer,
        is_long: bool = False,
    ) -> None:
        """
        Args:
            request: nobody changes it any more.
            planned: its context.
            is_long: how that is encoded, see `EncodedContext`.
        """
        query = list(request.query_tokens) if request.runs_query else []
        num_tail_tokens = len(query) + request.sampling.num_tokens_to_generate
        context, owner = request.context_tokens, request.owner
        super().__init__(request_id, context, query, num_tail_tokens, planned, is_long, owner)
        self.generates = request.sampling.num_tokens_to_generate > 0
        self.prompt_scores: PromptScores | None = None
        if request.prompt_logprobs is not None:
            self.score(request.prompt_logprobs)
            num_tokens = len(request.context_tokens) + len(query)
            self.prompt_scores = PromptScores(num_tokens, request.prompt_logprobs)
        self.request, self._text = request, AnswerText(tokenizer, request)
        self.cancelled = False
        self.ended = threading.Event()
        self.finish_reason = ""
        self.error: str | None = None
        self.is_refused = False
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[tuple[tuple[int, float], ...]] = []
        self._rules = self._make_rules()
        self.guide: Guide | None = None
        self.num_encoded_tokens = 0
        self.num_proposed_tokens = self.num_accepted_tokens = 0
        self.attention_map: AttentionMap | None = None
        self._submitted_at = self._admitted_at = self._encoded_at = self._first_token_at = (
            self._last_token_at
        ) = 0.0
        self._events: queue.SimpleQueue[NewToken | None] = queue.SimpleQueue()
        self._result: StarResult | None = None

    def _make_rules(self) -> AnswerRules | None:
        """None where the request has none."""
        request = self.request
        if request.rules == TokenRules():
            return None
        return AnswerRules(request.rules, (request.context_tokens, request.query_tokens), self.tokens)

    def __iter__(self) -> Iterator[NewToken]:
        """Tokens as they come, until the end; once."""
        while (event := self._events.get()) is not None:
            yield event

    def result(self, timeout: float | None = None) -> StarResult:
        """Wait for the end. Raises TimeoutError after `timeout` seconds."""
        if not self.ended.wait(timeout):
            raise TimeoutError(f"request {self.id} has not ended within {timeout} s")
        return self._result

    def cancel(self) -> None:
        """End it in the engine's next turn, with what it has; nothing happens if it has ended already."""
        self.cancelled = True

    @property
    def text(self) -> str:
        """So far, see `StarResult`."""
        return self._text.text

    @property
    def submitted_at(self) -> float:
        """When it came into the queue, by `monotonic`; 0 before that."""
        return self._submitted_at

    @property
    def is_late(self) -> bool:
        """Its deadline is over."""
        return monotonic() > self._submitted_at + self.request.deadline_seconds

    def note_submitted(self) -> None:
        """It is in the queue; its deadline counts from here."""
        self._submitted_at = monotonic()

    def note_admitted(self) -> None:
        """It left the queue."""
        self._admitted_at = monotonic()
        if self.context.encoded or not self.plan.num_tokens:
            self._note_encoded()

    def note_encoding(self) -> None:
        """How far its context is by now."""
        if self.context.encoded:
            self._note_encoded()
        elif self.context.next_wave:
            self.num_encoded_tokens = self.context.num_encoded_tokens

    def _note_encoded(self) -> None:
        self.num_encoded_tokens = self.plan.num_tokens
        self._encoded_at = self._encoded_at or monotonic()

    @property
    def num_fed_tokens(self) -> int:
        """Of the tail: the query, and the generated tokens but the last one."""
        return len(self.request.query_tokens) + len(self.tokens) - 1

    @property
    def ends_without_tokens(self) -> bool:
        """None are to be generated, and all that was asked of the prompt has been done."""
        return not (self.generates or self.pending) and self.context.encoded

    @property
    def most_proposed(self) -> int:
        """Proposals of which each can still be followed by a token of this answer."""
        room = self.request.sampling.num_tokens_to_generate - len(self.tokens) - 1
        return min(MOST_PROPOSED_TOKENS, room)

    def rows_to_sample(self, num_rows: int, vocab_size: int) -> list[RowToSample]:
        """How the next tokens, so many, are chosen from logits of this size, if those before are kept."""
        request, first, rules = self.request, len(self.tokens), self._rules
        ends = [end for end in request.all_end_tokens if end < vocab_size]
        masks = self._masks(num_rows)
        rows = []
        for index in range(num_rows):
            proposed = self.fed_proposals[:index]
            bad = rules.forbidden(proposed) if rules else ()
            rows.append(
                RowToSample(
                    request.sampling,
                    uniform(request.seed, first + index),
                    forbidden=[*bad, *ends] if first + index < request.min_tokens else bad,
                    rules=rules,
                    proposed=proposed,
                    mask=masks[index],
                    num_top_logprobs=request.num_top_logprobs,
                )
            )
        return rows

    def _masks(self, num_rows: int) -> list[Tensor | None]:
        if not (self.guide and num_rows):
            return [None] * num_rows
        masks = self.guide.masks(num_rows)
        self._note_guide()
        return masks

    def add_token(self, choice: Choice) -> None:
        """The next token of the answer; sets `finish_reason` at an end."""
        request, token = self.request, choice.token
        self.tokens.append(token)
        self.logprobs.append(choice.logprob)
        self.top.append(choice.top)
        self._last_token_at = monotonic()
        self._first_token_at = self._first_token_at or self._last_token_at
        if token in request.all_end_tokens:
            self.finish_reason = "stop"
        self._text.add(token, ends=bool(self.finish_reason))
        if not self.finish_reason:
            self._keep_to_grammar(token)
        if not self.finish_reason and len(self.tokens) == request.sampling.num_tokens_to_generate:
            self.finish_reason = "length"
        if self._text.cut_at_stop_text(num_tokens=len(self.tokens), is_over=bool(self.finish_reason)):
            self.finish_reason = "stop"
        text = self._text.emit(is_over=bool(self.finish_reason))
        self._events.put(NewToken(token, choice.logprob, text, choice.top))

    def _keep_to_grammar(self, token: int) -> None:
        """End the answer where nothing can follow this token."""
        if self.guide:
            self.guide.accept(token)
            self._note_guide()

    def _note_guide(self) -> None:
        if self.guide.error:
            self.refuse(self.guide.error)
        elif self.guide.is_over:
            self.finish_reason = "stop"

    def end_without_token(self) -> None:
        """No token is left for it: its grammar is complete, or what is asked cannot be."""
        if self.guide and self.guide.may_end:
            self.finish_reason = "stop"
        else:
            self.refuse(f"token {len(self.tokens)}: what was asked of the answer leaves no token for it")

    def refuse(self, error: str) -> None:
        """What was asked cannot be."""
        self.error, self.is_refused = error, True

    def end(self, reason: str, kv_bytes_per_cp_rank: list[int], kv_bytes_by_kind: dict[str, int]) -> None:
        """The one terminal state: `stop`, `length`, `cancelled`, `deadline` or `error`."""
        assert not self.ended.is_set()
        self.finish_reason = reason
        self._result = StarResult(
            text=self.text,
            tokens=self.tokens,
            logprobs=self.logprobs,
            finish_reason=reason,
            num_context_tokens=self.plan.num_tokens,
            num_query_tokens=len(self.request.query_tokens),
            mode=self.planned.star.mode,
            sizes=sizes_of(self.planned.star),
            num_blocks=self.plan.num_blocks,
            cache_hit=0 < self.plan.num_tokens == self.num_cached_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_proposed_tokens=self.num_proposed_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            timings=self._timings(),
            kv_bytes_per_rank=kv_bytes_per_cp_rank,
            kv_bytes_by_kind=kv_bytes_by_kind,
            error=self.error,
            is_refused=self.is_refused,
            attention_map=self.attention_map,
        )
        self.stage, self.context = Stage.ENDED, None
        self.ended.set()
        self._events.put(None)

    def _timings(self) -> Timings:
        admitted = self._admitted_at or self._last_token_at or monotonic()
        encoded = max(admitted, self._encoded_at) if self._encoded_at else admitted
        first = self._first_token_at or encoded
        last = self._last_token_at or first
        return Timings(
            queue_s=admitted - self._submitted_at,
            context_encoding_s=encoded - admitted,
            query_s=first - encoded,
            ttft_s=first - admitted,
            tpot_s=(last - first) / max(1, len(self.tokens) - 1),
        )
