"""Answer a batch of requests: encode their contexts, feed their queries, decode them together.

All ranks run this in step with the same requests. The driver samples and sends the tokens, so that no rank
can come to a different one.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_star.cost_model import choose_plan, token_costs
from megatron_star.inference.context_encoding import encode_context
from megatron_star.inference.kv_store import EncodedContext
from megatron_star.inference.request import StarRequest, StarResult, Timings
from megatron_star.inference.sampling import TokenSampler
from megatron_star.inference.star_model import StarModel
from megatron_star.inference.token_generation import Sequence, generate_step
from megatron_star.parallel.control import DRIVER, broadcast_token_ids, gather_integers


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of these tokens."""


class Progress(Protocol):
    """Told how a batch goes; a progress bar, usually."""

    def encoding(self, num_tokens: int) -> None:
        """So many more context tokens are encoded."""

    def generated(self, num_tokens: int) -> None:
        """So many more tokens are generated."""


class NoProgress:
    """A `Progress` that shows nothing."""

    def encoding(self, num_tokens: int) -> None:
        """Nothing to show."""

    def generated(self, num_tokens: int) -> None:
        """Nothing to show."""


@dataclass
class _Running:
    """One request on its way."""

    request: StarRequest
    sequence: Sequence
    mode: str
    context_encoding_s: float
    sampler: TokenSampler
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    query_s: float = 0.0
    decode_s: float = 0.0


class StarGenerator:
    """Answers batches of requests on the ranks of one model."""

    def __init__(
        self,
        star_model: StarModel,
        tokenizer: Tokenizer,
        control: dist.ProcessGroup,
        max_sequence_length: int,
    ) -> None:
        self.star_model, self.tokenizer, self.control = star_model, tokenizer, control
        self.max_sequence_length = max_sequence_length
        self.costs = token_costs(star_model.model.config)

    def check(self, request: StarRequest) -> None:
        """Raises ValueError if this request cannot be answered here."""
        request.check(vocab_size=self.star_model.vocab_size, max_sequence_length=self.max_sequence_length)

    def generate(self, requests: Iterable[StarRequest], progress: Progress | None = None) -> list[StarResult]:
        """Answer these requests, in their order. Contexts that are the same are encoded once.

        Raises:
            ValueError: a request cannot be answered; nothing was run.
        """
        requests, progress = list(requests), progress or NoProgress()
        for request in requests:
            self.check(request)
        batch = self._encode_contexts(requests, progress.encoding)
        self._feed_queries(batch)
        progress.generated(len(batch))
        while running := [item for item in batch if not item.finish_reason]:
            self._decode(running)
            progress.generated(len(running))
        return [self._result(item) for item in batch]

    def _encode_contexts(self, requests: list[StarRequest], on_wave: Callable[[int], None]) -> list[_Running]:
        encoded: dict[tuple, EncodedContext] = {}
        tail_tokens = Counter(dict.fromkeys(range(self.star_model.exchange.cp_size), 0))
        batch = []
        for request in requests:
            start = self._now()
            mode, plan = choose_plan(len(request.context_tokens), len(tail_tokens), request.star, self.costs)
            key = (tuple(request.context_tokens), plan)
            if key not in encoded:
                encoded[key] = encode_context(self.star_model, request.context_tokens, plan, on_wave)
            tail_rank = min(tail_tokens, key=lambda rank: tail_tokens[rank])
            tail_tokens[tail_rank] += len(request.query_tokens) + request.sampling.num_tokens_to_generate
            sequence = Sequence(encoded[key], tail_rank)
            sampler = TokenSampler(request.sampling, request.seed)
            batch.append(_Running(request, sequence, mode, self._now() - start, sampler))
        return batch

    def _feed_queries(self, batch: list[_Running]) -> None:
        start = self._now()
        logits = generate_step(
            self.star_model, [(item.sequence, item.request.query_tokens) for item in batch]
        )
        self._choose_tokens(batch, logits)
        for item in batch:
            item.query_s = self._now() - start

    def _decode(self, running: list[_Running]) -> None:
        start = self._now()
        logits = generate_step(self.star_model, [(item.sequence, item.tokens[-1:]) for item in running])
        self._choose_tokens(running, logits)
        for item in running:
            item.decode_s += self._now() - start

    def _choose_tokens(self, running: list[_Running], logits: torch.Tensor) -> None:
        """Sample on the driver, tell everyone, and note who has finished."""
        choices = [(0, 0.0)] * len(running)
        if dist.get_rank() == DRIVER:
            rows = logits.cpu()
            choices = [item.sampler.sample(row) for item, row in zip(running, rows, strict=True)]
        tokens = broadcast_token_ids([token for token, _ in choices], self.control)
        for item, token, (_, logprob) in zip(running, tokens, choices, strict=True):
            item.tokens.append(token)
            item.logprobs.append(logprob)
            self._note_the_end(item)

    def _note_the_end(self, item: _Running) -> None:
        sampling = item.request.sampling
        item.text = self.tokenizer.decode(item.tokens, skip_special_tokens=True)
        found = [item.text.find(stop) for stop in sampling.stop_words or () if stop in item.text]
        if found:
            item.text, item.finish_reason = item.text[: min(found)], "stop"
        elif item.tokens[-1] == sampling.termination_id:
            item.finish_reason = "stop"
        elif len(item.tokens) == sampling.num_tokens_to_generate:
            item.finish_reason = "length"

    def _result(self, item: _Running) -> StarResult:
        context = item.sequence.context
        return StarResult(
            text=item.text,
            tokens=item.tokens,
            logprobs=item.logprobs,
            finish_reason=item.finish_reason,
            num_context_tokens=context.plan.num_tokens,
            num_query_tokens=len(item.request.query_tokens),
            mode=item.mode,
            num_blocks=context.plan.num_blocks,
            timings=Timings(
                context_encoding_s=item.context_encoding_s,
                query_s=item.query_s,
                ttft_s=item.context_encoding_s + item.query_s,
                tpot_s=item.decode_s / max(1, len(item.tokens) - 1),
            ),
            kv_bytes_per_rank=gather_integers(context.num_bytes + item.sequence.tail.num_bytes, self.control),
        )

    def _now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.star_model.device.type == "cuda":
            torch.cuda.synchronize(self.star_model.device)
        return perf_counter()
