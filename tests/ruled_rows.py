"""Rows with every rule, and their logits as transformers' processors leave them."""

import random
from typing import NamedTuple

import torch
from megatron.core.inference.sampling_params import SamplingParams
from sampled_rows import VOCAB_SIZE, logits_of_all_kinds
from transformers.generation import logits_process

from megatron_star.engine.answer_rules import AnswerRules
from megatron_star.engine.row_to_sample import RowToSample
from megatron_star.engine.sampling import uniform
from megatron_star.engine.token_rules import TokenRules

NUM_WORDS = -(-VOCAB_SIZE // 32)


class RuledRow(NamedTuple):
    """A row, and what stands before it."""

    row: RowToSample
    prompt: list[int]


def random_rules(generator: random.Random) -> TokenRules:
    """Each rule in about half of the rows; tokens are from the first hundred, so that they meet."""

    def maybe(value, neutral):
        return value if generator.random() < 0.5 else neutral

    def token() -> int:
        return generator.randrange(100)

    return TokenRules(
        min_p=maybe(generator.choice([0.01, 0.2, 1.0]), 0.0),
        repetition_penalty=maybe(generator.choice([0.8, 1.3, 5.0]), 1.0),
        presence_penalty=maybe(generator.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(generator.uniform(-2, 2), 0.0),
        logit_bias=maybe(tuple({token(): generator.uniform(-100, 20) for _ in range(9)}.items()), ()),
        allowed_tokens=maybe(tuple(generator.sample(range(VOCAB_SIZE), 700)), None),
        bad_words=maybe(
            tuple(tuple(token() for _ in range(generator.choice([1, 2, 2, 3]))) for _ in range(400)), ()
        ),
    )


def ruled_rows(count: int, seed: int = 0) -> list[RuledRow]:
    """All kinds of sampling and rules; of an answer up to four rows, each with one more proposal."""
    generator, rows = random.Random(seed), []
    while len(rows) < count:
        prompt = [generator.randrange(100) for _ in range(generator.choice([1, 5, 200]))]
        tokens = [generator.randrange(100) for _ in range(generator.choice([0, 1, 60]))]
        answer = AnswerRules(random_rules(generator), (prompt[:2], prompt[2:]), tokens)
        proposals = [generator.randrange(100) for _ in range(generator.choice([0, 0, 3]))]
        sampling = SamplingParams(
            temperature=generator.choice([0.0, 0.7, 1.0, 1.7]),
            top_k=generator.choice([0, 0, 1, 40]),
            top_p=generator.choice([0.0, 0.0, 0.9]),
        )
        for n in range(len(proposals) + 1):
            row = RowToSample(
                sampling,
                uniform(seed, len(rows)),
                answer.forbidden(proposals[:n]),
                answer,
                proposals[:n],
                random_mask(len(rows)) if generator.random() < 0.3 else None,
                generator.choice([0, 1, 20]),
            )
            rows.append(RuledRow(row, prompt))
    return rows[:count]


def logits_for_rules(count: int) -> torch.Tensor:
    """[count, VOCAB_SIZE]: of either sign, and the first hundred tokens are the likeliest."""
    logits = logits_of_all_kinds(count)
    logits[:, :100] += 4.0
    return logits - torch.tensor([12.0, 16.0, 8.0]).repeat(count)[:count, None]


def random_mask(seed: int) -> torch.Tensor:
    """[NUM_WORDS] int32, half of the bits set: in all words, the first among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 31), 1 << 31, (NUM_WORDS,), generator=generator).int()


def logits_by_transformers(ruled: RuledRow, logits: torch.Tensor) -> torch.Tensor:
    """[vocab_size]: logits [vocab_size] as the rules leave them, one after the other in vLLM's order."""
    row, rules = ruled.row, ruled.row.rules.rules
    answer = [*row.rules.tokens, *row.proposed]
    came, scores = torch.tensor([ruled.prompt + answer]), logits.clone()[None]
    if rules.allowed_tokens is not None:
        others = torch.ones(VOCAB_SIZE, dtype=torch.bool)
        others[list(rules.allowed_tokens)] = False
        scores[:, others] = -torch.inf
    if row.mask is not None:
        bits = [(word >> bit) & 1 for word in row.mask.tolist() for bit in range(32)][:VOCAB_SIZE]
        scores[:, ~torch.tensor(bits, dtype=torch.bool)] = -torch.inf
    if rules.bad_words:
        words = [list(word) for word in rules.bad_words]
        scores = logits_process.NoBadWordsLogitsProcessor(words, eos_token_id=None)(came, scores)
    if rules.logit_bias:
        biases = {(token,): value for token, value in rules.logit_bias}
        scores = logits_process.SequenceBiasLogitsProcessor(biases)(came, scores)
    scores = logits_process.RepetitionPenaltyLogitsProcessor(rules.repetition_penalty)(came, scores)
    counts = torch.bincount(torch.tensor(answer, dtype=torch.int64), minlength=VOCAB_SIZE)
    scores = scores - rules.frequency_penalty * counts - rules.presence_penalty * (counts > 0)
    if rules.min_p and row.is_drawn:
        likely = logits_process.MinPLogitsWarper(rules.min_p)(came, scores / row.sampling.temperature)
        scores[likely.isneginf()] = -torch.inf
    return scores[0]
