"""A step that is replayed with the inputs of a later one gives its logits, fillers or not."""

import pytest
from distributed import run_ranks
from rerun_ranks import plain_and_rerun

pytest.importorskip("triton", reason="Triton is in torch's CUDA builds and in the extra `dev`")


@pytest.mark.parametrize(("name", "num_contexts"), [("gemma3_text", 2), ("qwen3_moe", 1)])
def test_replays_give_the_logits_of_plain_steps_while_sequences_come_and_go(converted, name, num_contexts):
    [found] = run_ranks(1, plain_and_rerun, str(converted(name).megatron), 3, num_contexts, 18)
    assert found.error is None and found.num_captured >= 2 and found.num_replayed >= 6, found
    assert found.worst < 1e-4, found
    assert found.loads_equal, "rows that experts were given are counted otherwise"
