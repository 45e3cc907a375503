"""What the registry keeps for each key: nobody finds another's, bounds are each one's own."""

import asyncio
from types import SimpleNamespace

import pytest

from megatron_star.config import FieldError
from megatron_star.server.ask import Ask, Generation, PlainPrompt
from megatron_star.server.contexts import Context, ContextRegistry
from megatron_star.server.errors import RequestError
from megatron_star.server.kept_context import KeptContext
from megatron_star.server.star_options import StarOptions
from megatron_star.server.wires.chat_schema import ChatRequest
from megatron_star.server.wires.context_schema import ContextRequest


@pytest.fixture
def registry() -> ContextRegistry:
    """Of an engine that notes what it is to forget."""
    forgotten: list = []
    engine = SimpleNamespace(forget=forgotten.append, forgotten=forgotten)
    return ContextRegistry(engine, most=2, most_bytes=2000)


def context(tenant: str, tokens: int = 10, ttl_seconds: int = 1000, **fields) -> Context:
    kept = KeptContext([1] * tokens)
    return Context(tenant=tenant, kept=kept, star=StarOptions(), ttl_seconds=ttl_seconds, **fields)


def ask(context_id: str | None, **fields) -> Ask:
    prompts = [PlainPrompt(content=[5], field="prompt"), PlainPrompt(content=[6], field="prompt")]
    fields = {"star": StarOptions(speculate="off"), **fields}
    return Ask(prompts=prompts, generation=Generation(num_tokens=1), context_id=context_id, **fields)


async def _another_key_finds_nothing(registry: ContextRegistry) -> None:
    own = context("anna", cache_salt="salt")
    registry.add(own)
    assert registry.get(own.id, "anna") is own and registry.of("anna") == [own] and registry.of("karl") == []
    told = []
    for find in (registry.get, lambda context_id, tenant: registry.resolved(ask(context_id), tenant)):
        for context_id, tenant in ((own.id, "karl"), (own.id, ""), ("ctx_" + "a" * 32, "karl")):
            with pytest.raises(RequestError) as error:
                find(context_id, tenant)
            told.append(
                (error.value.status, error.value.field, error.value.message.replace(context_id, "ID"))
            )
    assert set(told) == {(404, "context_id", "context_id: there is no context 'ID'")}


def test_another_key_is_told_what_one_is_told_about_an_id_that_does_not_exist(registry):
    asyncio.run(_another_key_finds_nothing(registry))


async def _bounds(registry: ContextRegistry) -> None:
    own = [context("anna") for _ in range(2)]
    for one in own:
        registry.add(one)
    with pytest.raises(RequestError, match="2 contexts already, of 2") as error:
        registry.add(context("anna"))
    assert error.value.status == 409
    registry.add(context("karl"))
    with pytest.raises(RequestError, match="of 2,000: delete one"):
        registry.add(context("karl", tokens=500))
    registry.delete(own[0])
    registry.add(context("anna"))
    assert registry.num_kept() == 3 and registry.num_bytes() == 3 * own[0].kept.num_bytes


def test_each_key_has_bounds_of_its_own(registry):
    asyncio.run(_bounds(registry))


async def _deleted(registry: ContextRegistry) -> None:
    twins = [context("anna", key=("digest", "mask")) for _ in range(2)]
    for one in twins:
        registry.add(one)
    for one in (twins[0], twins[0]):
        registry.delete(one)
    assert registry.engine.forgotten == []
    cancelled = []
    twins[1].answer = SimpleNamespace(cancel=lambda: cancelled.append(True))
    registry.delete(twins[1])
    assert registry.engine.forgotten == [("digest", "mask")] and cancelled == [True]


def test_the_engine_forgets_what_no_other_context_has(registry):
    asyncio.run(_deleted(registry))


async def _expires(registry: ContextRegistry) -> None:
    short, long = context("anna", ttl_seconds=0), context("anna")
    registry.add(long)
    registry.add(short)
    assert registry.of("anna") == [long]
    long.last_used -= 1001
    registry._expire_later(long)
    assert registry.of("anna") == []


def test_what_nobody_has_used_for_long_enough_is_deleted(registry):
    asyncio.run(_expires(registry))


async def _resolved(registry: ContextRegistry) -> None:
    own = context("anna", cache_salt="salt")
    own.star = StarOptions(mode="exact", block_size=7)
    registry.add(own)
    own.last_used = 1.0
    found = registry.resolved(ask(own.id), "anna")
    assert [prompt.kept for prompt in found.prompts] == [own.kept] * 2 and found.cache_salt == "salt"
    assert (found.star.mode, found.star.block_size, found.star.speculate) == ("exact", 7, "off")
    assert own.last_used > 1.0
    assert registry.resolved(ask(own.id, cache_salt="other"), "anna").cache_salt == "other"
    plain = ask(None)
    assert registry.resolved(plain, "anna") is plain
    for name, value in (("block_size", 7), ("separator", "#"), ("query_tokens", 3)):
        with pytest.raises(FieldError) as error:
            registry.resolved(ask(own.id, star=StarOptions(**{name: value})), "anna")
        assert error.value.field == f"star.{name}"


def test_what_is_asked_about_a_context_has_its_tokens_its_salt_and_its_way_of_encoding(registry):
    asyncio.run(_resolved(registry))


BEGINNING = {
    "messages": [{"role": "system", "content": "Answer."}],
    "tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}],
    "chat_template_kwargs": {"custom": 1},
    "reasoning_effort": "none",
}


def test_chats_are_foreseen_as_their_requests_are_read():
    chat = ChatRequest(model="m", **BEGINNING)
    sent = chat.chat(chat.tools_for_template(), effort=chat.reasoning_effort)
    found = ContextRequest(text="a", **BEGINNING).opening(has_template=False)
    assert (found.messages, found.tools, found.variables) == (sent.messages, sent.tools, sent.variables)


@pytest.mark.parametrize(
    ("fields", "has_template", "is_for_chat"),
    [
        ({"text": "a"}, True, True),
        ({"text": "a"}, False, False),
        ({"text": "a", "for_chat": False}, True, False),
        ({"text": "a", "messages": []}, False, True),
        ({"tokens": [1]}, True, False),
    ],
)
def test_texts_are_for_chats_where_the_model_has_a_template(fields, has_template, is_for_chat):
    opening = ContextRequest(**fields).opening(has_template=has_template)
    assert (opening is not None) == is_for_chat
