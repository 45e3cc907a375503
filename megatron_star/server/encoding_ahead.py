"""Has the engine encode a context before anybody asks about it, as a request that generates nothing.

So it waits its turn, and counts, like any request of its key.
"""

import asyncio
from contextlib import AsyncExitStack

from megatron_star.server.batch import Batch
from megatron_star.server.contexts import Context
from megatron_star.server.errors import RequestError
from megatron_star.server.service import CompletionService


async def start_encoding(service: CompletionService, context: Context) -> asyncio.Task:
    """Keep a context and submit it; the task that is returned ends when it is encoded, or is not.

    Raises:
        RequestError: it cannot be kept or encoded, now or ever; it is then not kept.
    """
    service.contexts.add(context)
    stack = AsyncExitStack()
    try:
        batch = await stack.enter_async_context(service.answer(context.ahead(), context.tenant))
    except BaseException:
        service.contexts.delete(context)
        raise
    context.note_submitted(batch.answers[0])
    task = asyncio.create_task(_until_encoded(stack, batch, context))
    service.encodings.add(task)
    task.add_done_callback(service.encodings.discard)
    return task


async def _until_encoded(stack: AsyncExitStack, batch: Batch, context: Context) -> None:
    async with stack:
        failure = None
        try:
            await batch.wait()
        except RequestError as error:
            failure = error
        context.note_ended(batch.results[0], failure)
