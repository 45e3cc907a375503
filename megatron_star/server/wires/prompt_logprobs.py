"""Log-probabilities of prompts: before a completion's own with `echo`, and as vLLM's `prompt_logprobs`."""

from functools import cache
from typing import Any

from megatron_star.engine.prompt_scores import TokenScore
from megatron_star.server.batch import Batch
from megatron_star.server.service import CompletionService
from megatron_star.server.wires.token_ids import TokenNames
from megatron_star.text.text_stream import TextStream, text_offsets

ScoredToken = tuple[int, TokenScore | None]


class PromptLogprobs:
    """Of the prompts of a batch whose answers have ended."""

    def __init__(
        self, service: CompletionService, batch: Batch, names: TokenNames, *, only_queries: bool = False
    ) -> None:
        """
        Args:
            names: what tokens are written with.
            only_queries: what stands before them was not a part of the prompts.
        """
        self.batch, self.only_queries = batch, only_queries
        self.tokenizer, self.token_bytes = service.tokenizer, names
        self.of_prompt = cache(self._of_prompt)

    def _of_prompt(self, index: int) -> list[ScoredToken]:
        """Its tokens; they have scores where these were asked for."""
        split, answer = self.batch.splits[index], self.batch.answers[index * self.batch.num_choices]
        tokens = split.context_tokens + split.query_tokens
        scores = answer.prompt_scores.to_list() if answer.prompt_scores else [None] * len(tokens)
        first = len(split.context_tokens) if self.only_queries else 0
        return list(zip(tokens[first:], scores[first:], strict=True))

    def before(self, index: int, logprobs: dict[str, Any]) -> dict[str, Any]:
        """The log-probabilities of an answer, behind those of its prompt, whose text it repeats."""
        prompt = index // self.batch.num_shown
        scored, length = self.of_prompt(prompt), len(self.batch.echoes[prompt])
        tokens = [token for token, _ in scored]
        top = [score and self._top(token, score) for token, score in scored]
        return {
            "tokens": self.token_bytes.pieces(tokens, at_start=True) + logprobs["tokens"],
            "token_logprobs": [score and score.logprob for _, score in scored] + logprobs["token_logprobs"],
            "text_offset": [
                *text_offsets(TextStream(self.tokenizer), tokens),
                *(length + offset for offset in logprobs["text_offset"]),
            ],
            "top_logprobs": top + logprobs["top_logprobs"] if logprobs["top_logprobs"] is not None else None,
        }

    def as_vllm(self, index: int) -> list[dict[str, Any] | None]:
        """For each token of a prompt what was likeliest in its place, and itself, by ids."""
        return [score and self._by_id(token, score) for token, score in self.of_prompt(index)]

    def _top(self, token: int, score: TokenScore) -> dict[str, float]:
        """By their texts; of tokens with the same text, the likeliest."""
        found: dict[str, float] = {}
        for likely, logprob in (*score.top, (token, score.logprob)):
            found.setdefault(self.token_bytes.piece(likely), logprob)
        return found

    def _by_id(self, token: int, score: TokenScore) -> dict[str, Any]:
        ranked = [(likely, logprob, rank) for rank, (likely, logprob) in enumerate(score.top, 1)]
        if all(likely != token for likely, *_ in ranked):
            ranked.append((token, score.logprob, score.rank))
        return {
            str(likely): {"logprob": logprob, "rank": rank, "decoded_token": self.token_bytes.piece(likely)}
            for likely, logprob, rank in ranked
        }
