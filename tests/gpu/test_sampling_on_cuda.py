"""A step's tokens on a GPU: each row's own, however many others are sampled with it, in one copy each way."""

import torch
from megatron.core.inference.sampling_params import SamplingParams
from reference import sampled_token
from ruled_rows import logits_by_transformers, logits_for_rules, ruled_rows
from sampled_rows import logits_of_all_kinds, rows_of_all_kinds
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_star.engine.answer_rules import AnswerRules
from megatron_star.engine.row_to_sample import RowToSample
from megatron_star.engine.sampling import sample_rows
from megatron_star.engine.token_rules import TokenRules


def large_logits(num_rows: int, device: torch.device) -> torch.Tensor:
    """[num_rows, 128K], some with bfloat16's many ties; the nucleus is from one token to most of them."""
    torch.manual_seed(0)
    spread = torch.tensor([1.0, 3.0, 6.0, 12.0], device=device).repeat(num_rows)[:num_rows, None]
    logits = torch.randn(num_rows, 128_256, device=device) * spread
    logits[::3] = logits[::3].bfloat16().float()
    return logits


def test_each_row_of_64_gets_the_tokens_that_it_gets_alone(gpu):
    rows, logits = rows_of_all_kinds(64), large_logits(64, gpu)
    together = sample_rows(logits, rows)
    assert [sample_rows(logits[i : i + 1], rows[i : i + 1])[0] for i in range(64)] == together
    assert [sample_rows(logits[i : i + 7], rows[i : i + 7])[0] for i in range(57)] == together[:57]


def test_the_tokens_are_those_of_the_sorted_vocabulary(gpu):
    rows, logits = rows_of_all_kinds(40), logits_of_all_kinds(40).to(gpu)
    for row, row_logits, choice in zip(rows, logits.cpu(), sample_rows(logits, rows), strict=True):
        s, expected = row.sampling, row_logits.double().log_softmax(-1)
        parameters = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
        # A GPU's powers of two differ in the last bit: the draw may fall on the other side of an edge.
        tokens = {
            sampled_token(row_logits, **parameters, random=number, forbidden=row.forbidden)
            for number in (row.random, max(0.0, row.random - 1e-5), min(row.random + 1e-5, 1 - 2**-53))
        }
        assert choice.token in tokens
        assert abs(choice.logprob - expected[choice.token]) < 1e-5


def test_a_step_copies_once_to_the_gpu_and_once_back(gpu):
    rows = [row for row in rows_of_all_kinds(200) if row.sampling.top_k in (0, 20)][:64]
    logits = 16 * large_logits(64, gpu)  # no nucleus is larger than the candidates that are looked at first
    sample_rows(logits, rows)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        sample_rows(logits, rows)
    copies = [e.name for e in recorded.events() if e.device_type == DeviceType.CUDA and "Memcpy" in e.name]
    assert sum("HtoD" in name for name in copies) == 1
    assert sum("DtoH" in name for name in copies) == 1


def test_rows_with_rules_get_the_tokens_that_they_get_alone(gpu):
    rows, logits = [each.row for each in ruled_rows(64, seed=1)], logits_for_rules(64).to(gpu)
    together = sample_rows(logits, rows)
    assert [sample_rows(logits[i : i + 1], rows[i : i + 1])[0] for i in range(64)] == together


def test_tokens_are_drawn_from_what_transformers_processors_leave(gpu):
    ruled, logits = ruled_rows(120), logits_for_rules(120)
    choices = sample_rows(logits.to(gpu), [each.row for each in ruled])
    for each, row_logits, choice in zip(ruled, logits, choices, strict=True):
        left, s = logits_by_transformers(each, row_logits), each.row.sampling
        parameters = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
        # A GPU's powers of two differ in the last bit: the draw may fall on the other side of an edge.
        tokens = {
            sampled_token(left, **parameters, random=number, forbidden=())
            for number in (
                each.row.random,
                max(0.0, each.row.random - 1e-5),
                min(each.row.random + 1e-5, 1 - 2**-53),
            )
        }
        assert choice.is_possible and choice.token in tokens


def test_a_step_with_penalties_and_likeliest_tokens_copies_once_to_the_gpu_and_once_back(gpu):
    rules = TokenRules(repetition_penalty=1.1, frequency_penalty=0.5, logit_bias=((5, 3.0),), min_p=0.1)
    answers = [AnswerRules(rules, [[1, 2, 3]], [4, 5]) for _ in range(16)]
    rows = [
        RowToSample(SamplingParams(top_k=20), 0.3, rules=answer, num_top_logprobs=20) for answer in answers
    ]
    logits = 16 * large_logits(16, gpu)
    sample_rows(logits, rows)  # what an answer's first step makes, others use
    for answer in answers:
        answer.tokens.append(7)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        sample_rows(logits, rows)
    copies = [e.name for e in recorded.events() if e.device_type == DeviceType.CUDA and "Memcpy" in e.name]
    assert sum("HtoD" in name for name in copies) == 1
    assert sum("DtoH" in name for name in copies) == 1
