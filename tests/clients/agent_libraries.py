"""LangChain and LlamaIndex as they are on PyPI, against a running server: answers, streams, tools, structure.

    python3 -m venv /tmp/agents && echo 'litellm<0' > /tmp/agents/constraints.txt
    /tmp/agents/bin/pip install -c /tmp/agents/constraints.txt langchain-openai llama-index-llms-openai-like
    torchrun --nproc-per-node 2 launch/run_text_generation_server.py --load .demo/megatron \\
        --context-parallel-size 2 --served-model-name smollm2 --tool-call-parser hermes
    /tmp/agents/bin/python tests/clients/agent_libraries.py http://127.0.0.1:5000 smollm2

It prints a line a case; the status is 1 if one failed. It runs in the libraries' environment, not in ours.
"""

import sys
import traceback
from collections.abc import Callable

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

QUESTION = "What is the weather in Lisbon?"


class Person(BaseModel):
    """What a structured answer looks like."""

    name: str


def weather(city: str) -> str:
    """The weather of a city."""
    return f"grey in {city}"


def langchain_cases(url: str, model: str, *, responses: bool) -> dict[str, Callable[[], None]]:
    """By /v1/chat/completions or /v1/responses."""
    chat = ChatOpenAI(
        base_url=f"{url}/v1",
        api_key="any",
        model=model,
        temperature=0,
        max_tokens=60,
        max_retries=0,
        use_responses_api=responses,
    )

    def tools() -> None:
        called = chat.bind_tools([weather], tool_choice="weather", parallel_tool_calls=False).invoke(QUESTION)
        assert called.tool_calls[0]["name"] == "weather" and "city" in called.tool_calls[0]["args"]
        results = [ToolMessage(weather("Lisbon"), tool_call_id=call["id"]) for call in called.tool_calls]
        assert chat.bind_tools([weather]).invoke([HumanMessage(QUESTION), called, *results]).content

    def structured() -> None:
        found = chat.with_structured_output(Person, method="json_schema").invoke("A person named Bo.")
        assert isinstance(found, Person)

    def stream() -> None:
        assert len(list(chat.stream(QUESTION))) > 3

    name = "langchain, responses" if responses else "langchain, chat"
    cases = {"tools": tools, "structured output": structured, "stream": stream}
    return {f"{name}: {case}": run for case, run in cases.items()}


def llama_index_cases(url: str, model: str) -> dict[str, Callable[[], None]]:
    """By /v1/chat/completions."""
    chat = OpenAILike(
        model=model,
        api_base=f"{url}/v1",
        api_key="any",
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=60,
        temperature=0,
        max_retries=0,
    )
    tool = FunctionTool.from_defaults(weather)

    def tools() -> None:
        called = chat.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
        call = chat.get_tool_calls_from_response(called)[0]
        result = ChatMessage(
            role="tool", content=weather("Lisbon"), additional_kwargs={"tool_call_id": call.tool_id}
        )
        history = [ChatMessage(role="user", content=QUESTION), called.message, result]
        assert chat.chat_with_tools([tool], chat_history=history).message.content

    def stream() -> None:
        assert len(list(chat.stream_chat([ChatMessage(role="user", content=QUESTION)]))) > 3

    return {"llama-index: tools": tools, "llama-index: stream": stream}


def main() -> None:
    """Every case, and the status."""
    url, model = sys.argv[1:]
    cases = langchain_cases(url, model, responses=False) | langchain_cases(url, model, responses=True)
    failed = 0
    for name, run in (cases | llama_index_cases(url, model)).items():
        try:
            run()
        except Exception:  # whatever a library makes of an answer
            failed += 1
            print(f"{name}: failed\n{traceback.format_exc()}")
        else:
            print(f"{name}: as it should be")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
