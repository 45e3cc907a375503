"""What the ranks of test_context_store.py run: an engine with a context store, started again and again."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.distributed as dist
from ranks import ENGINE_LIMITS, NumbersAsText, random_star_model
from torch import Tensor

from megatron_star.engine.context_store import ContextStore
from megatron_star.engine.engine import StarEngine, run_worker
from megatron_star.engine.rank_store import RankStore
from megatron_star.engine.request import StarRequest, StarResult
from megatron_star.model.kernel import kv_format_of
from megatron_star.store.folder import ContextFolder

FACTS = {"model": "random", "code": "this"}


class Asked(NamedTuple):
    """What came of a request, and the logits of its first token [vocabulary]."""

    result: StarResult
    logits: Tensor


class Served(NamedTuple):
    """What an engine did from its start to its end; of workers, nothing."""

    asked: list[Asked]
    num_encoded: int
    counts: dict[str, int]


def serve(
    args: dict[str, Any],
    folder: Path,
    requests: Sequence[StarRequest],
    facts: dict[str, Any] | None = None,
    most_bytes: int = 1 << 30,
    tp_size: int = 1,
    kv_dtype: str = "auto",
    read_only: bool = False,
) -> Served | None:
    """Start an engine with a store, ask one request after the other, and stop it."""
    folder.mkdir(exist_ok=True)
    star_model, groups = random_star_model(args, tp_size)
    star_model = replace(star_model, kv_format=kv_format_of(star_model.model, kv_dtype, star_model.device))
    rank_store = RankStore(folder, star_model, groups.model.tp.rank())
    if dist.get_rank():
        run_worker(star_model, groups.control, rank_store)
        return None
    with patch.object(ContextFolder, "is_writable", not read_only):
        store = ContextStore(
            ContextFolder(folder, most_bytes),
            FACTS | (facts or {}),
            model="random",
            cp_size=groups.cp.size(),
            tp_size=tp_size,
            least_tokens=1,
        )
    engine = StarEngine(
        star_model, NumbersAsText(), groups.control, **ENGINE_LIMITS, stores=(store, rank_store)
    )
    asked = [_ask(engine, request) for request in requests]
    engine.stop()
    return Served(asked, engine.num_context_encodings, store.counts.to_json())


def serve_side_by_side(
    args: dict[str, Any], folder: Path, requests: Sequence[StarRequest]
) -> list[list[int]]:
    """Two engines on one folder, in turns; the tokens that each of them gives."""
    star_model, groups = random_star_model(args, 1)
    engines = []
    for _ in range(2):
        store = ContextStore(
            ContextFolder(folder, 1 << 30), FACTS, model="random", cp_size=1, tp_size=1, least_tokens=1
        )
        stores = store, RankStore(folder, star_model, 0)
        engines.append(
            StarEngine(star_model, NumbersAsText(), groups.control, **ENGINE_LIMITS, stores=stores)
        )
    answers = [[engine.submit(request) for request in requests] for engine in engines]
    while not all(answer.ended.is_set() for of_engine in answers for answer in of_engine):
        for engine in engines:
            engine.step()
    for engine in engines:
        engine.stop()
    return [[answer.result().tokens for answer in of_engine] for of_engine in answers]


def _ask(engine: StarEngine, request: StarRequest) -> Asked:
    first: list[Tensor] = []
    execute = engine.executor.execute

    def noted(command: Any) -> Tensor | None:
        logits = execute(command)
        if logits is not None and len(logits):
            first.append(logits[0].clone())
        return logits

    with patch.object(engine.executor, "execute", noted):
        (result,) = engine.generate([request])
    return Asked(result, first[0])
