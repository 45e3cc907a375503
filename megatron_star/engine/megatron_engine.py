"""Our engine in the shape that Megatron's own server classes hold: `MegatronServer(MegatronEngine(...))`.

They broadcast over Megatron's groups before they call `generate`, which our workers do not wait for, so this
is for a job of one rank. `launch/run_text_generation_server.py` speaks the same wire on any number of ranks.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from megatron.core.inference.engines.abstract_engine import AbstractEngine
from megatron.core.inference.inference_request import InferenceRequest, Status
from megatron.core.inference.sampling_params import SamplingParams
from transformers import PreTrainedTokenizerBase

from megatron_star.config import StarConfig
from megatron_star.engine.engine import StarEngine
from megatron_star.engine.request import StarRequest, StarResult
from megatron_star.text.end_tokens import end_tokens, stop_tokens
from megatron_star.text.prompt import at_last_tokens
from megatron_star.text.text_stream import TextStream, text_offsets
from megatron_star.text.token_bytes import TokenBytes

DEFAULT_QUERY_TOKENS = 256


class TokenizerView:
    """A Hugging Face tokenizer under the names of Megatron's tokenizers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.eod, self.bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.vocab_size = len(tokenizer)

    def tokenize(self, text: str) -> list[int]:
        """Token ids; special tokens in the text are recognised, none is added."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of these tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def offsets(self, token_ids: Sequence[int], text: str) -> list[int]:
        """Where in the text each token begins, in characters."""
        starts = text_offsets(TextStream(self._tokenizer), token_ids)
        return [min(start, len(text)) for start in starts]


class MegatronEngine(AbstractEngine):
    """`generate` and the attributes that Megatron's server classes use.

    Attributes:
        controller: `tokenizer`, and `sampling_rng`, which the server seeds for a request with a seed.
    """

    def __init__(
        self, engine: StarEngine, star: StarConfig, num_query_tokens: int = DEFAULT_QUERY_TOKENS
    ) -> None:
        """The last `num_query_tokens` of a prompt are its query, what comes before them its context."""
        self.engine, self.star, self.num_query_tokens = engine, star, num_query_tokens
        self.controller = SimpleNamespace(
            tokenizer=TokenizerView(engine.tokenizer), sampling_rng=torch.Generator()
        )
        self._end_tokens = end_tokens(engine.tokenizer)
        self._token_bytes = TokenBytes(engine.tokenizer)
        self._num_requests = 0

    def get_new_request_id(self) -> int:
        """An id that no request had before."""
        self._num_requests += 1
        return self._num_requests - 1

    def generate(
        self,
        prompts: list[str] | None = None,
        sampling_params: SamplingParams | None = None,
        inference_requests: list[InferenceRequest] | None = None,
    ) -> list[InferenceRequest]:
        """Answer prompts, or requests with prompt tokens; returns the requests with their results filled in.

        Raises:
            ValueError: a request cannot be answered; none was run.
            RuntimeError: the model's logits were not finite.
        """
        requests = inference_requests or [
            self._request_of(prompt, sampling_params or SamplingParams()) for prompt in prompts or []
        ]
        results = self.engine.generate(self._star_request(request) for request in requests)
        for request, result in zip(requests, results, strict=True):
            self._fill_in(request, result)
        if failed := [result.error for result in results if result.error]:
            raise RuntimeError(failed[0])
        return requests

    def _request_of(self, prompt: str, sampling_params: SamplingParams) -> InferenceRequest:
        return InferenceRequest(
            request_id=self.get_new_request_id(),
            prompt=prompt,
            prompt_tokens=self.controller.tokenizer.tokenize(prompt),
            sampling_params=sampling_params,
        )

    def _star_request(self, request: InferenceRequest) -> StarRequest:
        sampling = SamplingParams.deserialize(request.sampling_params.serialize())
        ends = self._end_tokens if sampling.termination_id is None else ()
        split = at_last_tokens(list(request.prompt_tokens), self.num_query_tokens)
        seed = torch.randint(1 << 62, (1,), generator=self.controller.sampling_rng)
        return StarRequest(
            context_tokens=split.context_tokens,
            query_tokens=split.query_tokens,
            star=self.star,
            sampling=sampling,
            seed=int(seed),
            end_tokens=(*ends, *stop_tokens(self.engine.tokenizer, sampling.stop_words or ())),
        )

    def _fill_in(self, request: InferenceRequest, result: StarResult) -> None:
        """Log-probabilities of the prompt are None: a context has no logits."""
        request.status = Status.FAILED if result.error else Status.COMPLETED
        request.generated_text = result.text
        request.generated_tokens = torch.tensor(result.tokens)
        request.generated_length = len(result.tokens)
        request.prompt_log_probs = [None] * (len(request.prompt_tokens) - 1)
        request.generated_log_probs = result.logprobs
        tokens = [*request.prompt_tokens, *result.tokens]
        request.segments = self._token_bytes.pieces(tokens, at_start=True)
