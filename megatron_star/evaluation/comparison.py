"""What a setting changes in the answer to one question: every rank runs this, exact first, then each setting.

Exact answers greedily. A setting is shown exact's answer and predicts each of its tokens (teacher forcing):
its own greedy answer is the same if, and only if, its most likely token is exact's at every place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from time import monotonic
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import kl_div

from megatron_star.algorithm.context_encoding import encode_context
from megatron_star.algorithm.kv_store import EncodedContext
from megatron_star.algorithm.star_model import StarModel
from megatron_star.algorithm.token_generation import Sequence as TokenSequence
from megatron_star.algorithm.token_generation import TokenGenerationStep, generate_step
from megatron_star.config import StarConfig
from megatron_star.engine.executor import planner_of
from megatron_star.engine.finite import why_not_finite
from megatron_star.evaluation.hidden_attention import hidden_masses
from megatron_star.model.longrope import needs_long_factors
from megatron_star.parallel.control import broadcast_token_ids, on_every_rank
from megatron_star.planning.mask import Mask
from megatron_star.planning.plan import ContextPlan, TokenCosts

NUM_PROBES = 16
EXACT = StarConfig(mode="exact")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One setting against exact, on one question.

    Attributes:
        same_first_token: the most likely first token is the same.
        changed: the greedy answer differs somewhere.
        kl: mean over the answer's tokens of KL(exact || setting), in nats, over the whole vocabulary.
        hidden_mass: see `hidden_attention`; from `NUM_PROBES` context tokens.
        exact_ttft_s, ttft_s: context encoding and exact's query step, in seconds.
        exact_flops, flops: of the encoding on the slowest rank.
    """

    same_first_token: bool
    changed: bool
    kl: float
    hidden_mass: float
    exact_ttft_s: float
    ttft_s: float
    exact_flops: float
    flops: float


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


class _Exact(NamedTuple):
    """What exact attention gave: tokens, and the logits [tokens, vocabulary] that they come from."""

    tokens: list[int]
    logits: Tensor
    encoding_s: float
    query_s: float
    plan: ContextPlan


def compare(
    star_model: StarModel,
    prompt: ComparedPrompt,
    settings: Mapping[str, StarConfig],
    control: dist.ProcessGroup,
) -> tuple[list[int], dict[str, Comparison]]:
    """Exact's answer, and each setting compared with it; on every rank, with the same arguments.

    One context is held at a time.

    Raises:
        SharedError: logits are not finite.
    """
    planner, num_tokens = planner_of(star_model), len(prompt.context)
    plans = {name: planner.plan(num_tokens, star).plan for name, star in settings.items()}
    exact_plan = planner.plan(num_tokens, EXACT).plan
    exact, hidden = _exact(star_model, prompt, exact_plan, [plans[name].mask for name in settings], control)
    comparisons = {
        name: _compared(star_model, prompt, exact, plans[name], mass, planner.costs)
        for name, mass in zip(settings, hidden, strict=True)
    }
    on_every_rank(lambda: _check_finite(exact, comparisons), control)
    return exact.tokens, comparisons


def _check_finite(exact: _Exact, comparisons: Mapping[str, Comparison]) -> None:
    for number, row in enumerate(exact.logits):
        if why := why_not_finite(row, number):
            raise ValueError(why)
    for name, comparison in comparisons.items():
        if not isfinite(comparison.kl) or not isfinite(comparison.hidden_mass):
            raise ValueError(f"{name}: logits are not finite: the dtype cannot hold what the model computes")


def _exact(
    star_model: StarModel,
    prompt: ComparedPrompt,
    plan: ContextPlan,
    masks: Sequence[Mask],
    control: dist.ProcessGroup,
) -> tuple[_Exact, list[float]]:
    """The answer of exact attention, and what each mask would hide from it."""
    context, encoding_s = _timed_encoding(star_model, prompt, plan, keeps_all=True)
    tokens, logits, query_s = _greedy_answer(star_model, context, prompt, control)
    positions = probe_positions(len(prompt.context))
    hidden = hidden_masses(star_model, prompt.context, context, masks, positions)
    return _Exact(tokens, logits, encoding_s, query_s, plan), hidden


def _compared(
    star_model: StarModel,
    prompt: ComparedPrompt,
    exact: _Exact,
    plan: ContextPlan,
    hidden_mass: float,
    costs: TokenCosts,
) -> Comparison:
    context, seconds = _timed_encoding(star_model, prompt, plan)
    logits = forced_logits(star_model, context, prompt.query, exact.tokens)
    agrees = (logits.argmax(-1) == torch.tensor(exact.tokens, device=logits.device)).tolist()
    return Comparison(
        same_first_token=agrees[0],
        changed=not all(agrees),
        kl=mean_kl(exact.logits, logits),
        hidden_mass=hidden_mass,
        exact_ttft_s=exact.encoding_s + exact.query_s,
        ttft_s=seconds + exact.query_s,
        exact_flops=exact.plan.cost(costs),
        flops=plan.cost(costs),
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
    step = TokenGenerationStep(star_model, [(TokenSequence(context, tail_rank=0), token_ids)])
    return star_model.forward(token_ids, step, range(len(query) - 1, len(token_ids)))


def mean_kl(exact_logits: Tensor, logits: Tensor) -> float:
    """Mean of KL(exact || other) over rows; never below 0, whatever the rounding; NaN of logits with NaN."""
    log_exact, log_other = exact_logits.log_softmax(-1), logits.log_softmax(-1)
    mean = float(kl_div(log_other, log_exact, reduction="batchmean", log_target=True))
    return 0.0 if mean < 0 else mean
