"""What a setting changes in the answer to one question: every rank runs this, exact first, then any setting.

Exact answers greedily. A setting is shown exact's answer and predicts each of its tokens (teacher forcing):
its own greedy answer is the same if, and only if, its most likely token is exact's at every place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from time import monotonic

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import kl_div

from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.encoded_context import EncodedContext
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_generation import NewTokens, TokenGenerationStep, generate_step
from megatron_star.algorithm.token_generation import Sequence as TokenSequence
from megatron_star.config import StarConfig
from megatron_star.engine.executor import planner_of
from megatron_star.engine.finite import why_not_finite
from megatron_star.evaluation.hidden_attention import hidden_masses
from megatron_star.evaluation.setting_text import encoded_as
from megatron_star.model.longrope import needs_long_factors
from megatron_star.parallel.control import broadcast_token_ids, on_every_rank
from megatron_star.planning.plan import ContextPlan

NUM_PROBES = 16
NUM_LIKELY = 16
LEAST_REST = 1e-12
"""Below it, what is left of a probability of 1 is rounding."""
EXACT = StarConfig(mode="exact")


@dataclass(frozen=True, kw_only=True)
class ExactAnswer:
    """Exact attention's greedy answer to one question, and what settings are compared with; survives JSON.

    Attributes:
        tokens: of the answer.
        likely: before each of them, the ids of the `NUM_LIKELY` most likely tokens, the likeliest first.
        log_ps: the log-probabilities of these, in nats.
        encoding_s, query_s: of the context and of the query's step.
        flops: of the encoding on the slowest rank.
        hidden_masses: by setting; see `hidden_attention`; from `NUM_PROBES` context tokens.
    """

    tokens: Sequence[int]
    likely: Sequence[Sequence[int]]
    log_ps: Sequence[Sequence[float]]
    encoding_s: float
    query_s: float
    flops: float
    hidden_masses: Mapping[str, float]

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.encoding_s + self.query_s


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One setting against exact, on one question.

    Attributes:
        same_first_token: the most likely first token is the same.
        changed: the greedy answer differs somewhere.
        kl: mean over the answer's tokens of KL(exact || setting), in nats. What is not among exact's likely
            tokens counts as one token.
        ttft_s: its context encoding and exact's query step, in seconds.
        flops: of the encoding on the slowest rank.
        encoded_as: the setting with its mode and sizes decided.
    """

    same_first_token: bool
    changed: bool
    kl: float
    ttft_s: float
    flops: float
    encoded_as: str


@dataclass(frozen=True)
class ComparedPrompt:
    """Token ids of a context and a query, where the answer ends, and how long it gets at most.

    Attributes:
        end_tokens: that end it as `end_token` does.
    """

    context: Sequence[int]
    query: Sequence[int]
    end_token: int | None
    num_tokens: int
    end_tokens: tuple[int, ...] = ()


def answer_exactly(
    star_model: StarModel,
    prompt: ComparedPrompt,
    settings: Mapping[str, StarConfig],
    control: dist.ProcessGroup,
) -> ExactAnswer:
    """Exact's answer, and what each setting would hide from it; on every rank, with the same arguments.

    Raises:
        SharedError: logits are not finite.
    """
    planner, num_tokens = planner_of(star_model), len(prompt.context)
    masks = [planner.plan(num_tokens, star).plan.mask for star in settings.values()]
    plan = planner.plan(num_tokens, EXACT).plan
    context, encoding_s = _timed_encoding(star_model, prompt, plan, keeps_all=True)
    tokens, logits, query_s = _greedy_answer(star_model, context, prompt, control)
    hidden = hidden_masses(star_model, prompt.context, context, masks, probe_positions(num_tokens))
    on_every_rank(lambda: _check_finite(logits, hidden), control)
    log_ps, likely = log_probabilities(logits).topk(min(NUM_LIKELY, logits.size(-1)))
    return ExactAnswer(
        tokens=tokens,
        likely=likely.tolist(),
        log_ps=log_ps.tolist(),
        encoding_s=encoding_s,
        query_s=query_s,
        flops=plan.cost(planner.costs),
        hidden_masses=dict(zip(settings, hidden, strict=True)),
    )


def _check_finite(logits: Tensor, numbers: Sequence[float]) -> None:
    for number, row in enumerate(logits):
        if why := why_not_finite(row, number):
            raise ValueError(why)
    if not all(map(isfinite, numbers)):
        raise ValueError("logits are not finite: the dtype cannot hold what the model computes")


def compare(
    star_model: StarModel,
    prompt: ComparedPrompt,
    exact: ExactAnswer,
    star: StarConfig,
    control: dist.ProcessGroup,
) -> Comparison:
    """A setting compared with exact's answer; on every rank, with the same arguments.

    Raises:
        SharedError: logits are not finite.
    """
    planner = planner_of(star_model)
    planned = planner.plan(len(prompt.context), star)
    context, seconds = _timed_encoding(star_model, prompt, planned.plan)
    logits = forced_logits(star_model, context, prompt.query, exact.tokens)
    on_every_rank(lambda: _check_finite(logits, ()), control)
    agrees = (logits.argmax(-1) == torch.tensor(exact.tokens, device=logits.device)).tolist()
    return Comparison(
        same_first_token=agrees[0],
        changed=not all(agrees),
        kl=mean_kl(exact.likely, exact.log_ps, logits),
        ttft_s=seconds + exact.query_s,
        flops=planned.plan.cost(planner.costs),
        encoded_as=encoded_as(star, planned.star),
    )


def probe_positions(num_tokens: int) -> list[int]:
    """Positions of context tokens, spread evenly; the last one is the last token."""
    count = min(NUM_PROBES, num_tokens)
    return [num_tokens * i // count - 1 for i in range(1, count + 1)]


def _timed_encoding(
    star_model: StarModel, prompt: ComparedPrompt, plan: ContextPlan, *, keeps_all: bool = False
) -> tuple[EncodedContext, float]:
    num_prompt = len(prompt.context) + len(prompt.query)
    is_long = needs_long_factors(star_model.model.config, num_prompt, prompt.num_tokens)
    start = monotonic()
    context = encode_context(star_model, prompt.context, plan, keeps_all=keeps_all, is_long=is_long)
    star_model.synchronize()
    return context, monotonic() - start


def _greedy_answer(
    star_model: StarModel, context: EncodedContext, prompt: ComparedPrompt, control: dist.ProcessGroup
) -> tuple[list[int], Tensor, float]:
    """Tokens, the logits [tokens, vocabulary] that they come from, and the seconds of the query's step."""

    def most_likely(logits: Tensor) -> int:
        # The driver's choice, so that ranks whose rounding differs still answer alike.
        return broadcast_token_ids([int(logits.argmax())], control)[0]

    sequence = TokenSequence(context, tail_rank=0)
    start = monotonic()
    logits = [generate_step(star_model, [(sequence, prompt.query)])]
    tokens = [most_likely(logits[0])]
    query_s = monotonic() - start
    ends = (prompt.end_token, *prompt.end_tokens)
    while len(tokens) < prompt.num_tokens and tokens[-1] not in ends:
        logits.append(generate_step(star_model, [(sequence, tokens[-1:])]))
        tokens.append(most_likely(logits[-1]))
    return tokens, torch.cat(logits), query_s


def forced_logits(
    star_model: StarModel, context: EncodedContext, query: Sequence[int], answer: Sequence[int]
) -> Tensor:
    """Logits [answer tokens, vocabulary] before each token of the answer, in one forward pass."""
    token_ids = [*query, *answer[:-1]]
    step = TokenGenerationStep(star_model, [NewTokens(TokenSequence(context, tail_rank=0), token_ids)])
    return star_model.forward(token_ids, step, range(len(query) - 1, len(token_ids)))


def log_probabilities(logits: Tensor) -> Tensor:
    """Of logits [tokens, vocabulary], in float64."""
    return logits.double().log_softmax(-1)


def mean_kl(likely: Sequence[Sequence[int]], log_ps: Sequence[Sequence[float]], logits: Tensor) -> float:
    """Mean over rows of KL(exact || other), all but exact's likely tokens taken as one; never below 0.

    So it is at most the KL over the whole vocabulary, and little below it.

    Args:
        likely, log_ps: of an `ExactAnswer`.
        logits: [tokens, vocabulary] of the other.
    """
    ids = torch.tensor(likely, device=logits.device)
    log_exact = _with_the_rest(torch.tensor(log_ps, dtype=torch.float64, device=logits.device))
    log_other = _with_the_rest(log_probabilities(logits).gather(1, ids))
    mean = float(kl_div(log_other, log_exact, reduction="batchmean", log_target=True))
    return 0.0 if mean < 0 else mean


def _with_the_rest(log_ps: Tensor) -> Tensor:
    """[tokens, likely + 1]: behind them the log-probability of all other tokens together."""
    rest = (1 - log_ps.exp().sum(1, keepdim=True)).clamp(min=LEAST_REST)
    return torch.cat((log_ps, rest.log()), 1)
