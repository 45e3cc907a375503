"""What is refused of a request says which field it was."""

import pytest
from megatron.core.inference.sampling_params import SamplingParams

from megatron_star.config import FieldError, StarConfig
from megatron_star.engine.request import StarRequest

SAMPLING = {"num_tokens_to_generate": 4}


@pytest.mark.parametrize(
    ("sampling", "fields", "field"),
    [
        ({"num_tokens_to_generate": -1}, {}, "num_tokens_to_generate"),
        ({"temperature": -1.0}, {}, "temperature"),
        ({"top_k": 10}, {}, "top_k"),
        ({"top_p": 1.5}, {}, "top_p"),
        ({}, {"min_tokens": 5}, "min_tokens"),
        ({}, {"deadline_seconds": 0.0}, "deadline_seconds"),
        ({}, {"turn_edges": (3,)}, "turn_edges"),
    ],
)
def test_a_value_that_is_refused_carries_the_name_of_its_field(sampling, fields, field):
    request = StarRequest(
        context_tokens=[1, 2, 3], query_tokens=[1], sampling=SamplingParams(**SAMPLING | sampling), **fields
    )
    with pytest.raises(FieldError, match=field) as error:
        request.check(vocab_size=10, max_sequence_length=20)
    assert error.value.field == field


@pytest.mark.parametrize(("field", "value"), [("mode", "?"), ("block_size", 0), ("anchor_size", -1)])
def test_so_does_an_option_of_star_attention(field, value):
    with pytest.raises(FieldError, match=field) as error:
        StarConfig(**{field: value})
    assert error.value.field == field
