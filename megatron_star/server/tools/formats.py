"""Which formats a model uses: as named on the command line, or as its chat template shows."""

from transformers import PreTrainedTokenizerBase

from megatron_star.server.tools.answer_parser import AnswerFormats
from megatron_star.server.tools.call_format import CallFormat
from megatron_star.server.tools.deepseek import DeepSeek
from megatron_star.server.tools.glm import Glm
from megatron_star.server.tools.harmony import Harmony
from megatron_star.server.tools.hermes import Hermes
from megatron_star.server.tools.llama import Llama
from megatron_star.server.tools.mistral import Mistral
from megatron_star.server.tools.qwen_coder import QwenCoder
from megatron_star.server.tools.reasoning import ReasoningFormat

AUTO, OFF = "auto", "off"
CALL_FORMATS: tuple[CallFormat, ...] = (
    Hermes(),
    QwenCoder(),
    Llama(),
    Mistral("mistral", as_list=True),
    Mistral("mistral_v11", as_list=False),
    Glm(),
    DeepSeek("deepseek_v3", in_block=True),
    DeepSeek("deepseek_v31", in_block=False),
    Harmony(),
)
REASONING_FORMATS = (
    ReasoningFormat(("qwen3", "glm45", "deepseek_v3"), "<think>", "</think>"),
    ReasoningFormat(("deepseek_r1",), "<think>", "</think>", always=True),
    ReasoningFormat(("mistral",), "[THINK]", "[/THINK]"),
)
HARMONY, HARMONY_REASONING = "openai", "openai_gptoss"
CALL_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|message|>"), HARMONY),
    (("<｜tool▁sep｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁sep｜>",), "deepseek_v31"),
    (("<arg_key>",), "glm45"),
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<tool_call>",), "hermes"),
    (("[TOOL_CALLS]", "[ARGS]"), "mistral_v11"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|python_tag|>",), "llama3_json"),
    (('"parameters": dictionary of argument name',), "llama3_json"),
)
"""What all stands in a chat template, and the format that this shows; the first that fits."""
REASONING_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|message|>"), HARMONY_REASONING),
    (("[THINK]",), "mistral"),
    (("</think>",), "qwen3"),
    (("<think>",), "qwen3"),
)
CALL_NAMES = tuple(name for known in CALL_FORMATS for name in known.names)
REASONING_NAMES = (*(name for known in REASONING_FORMATS for name in known.names), HARMONY_REASONING)


def answer_formats(tokenizer: PreTrainedTokenizerBase, calls: str, reasoning: str) -> AnswerFormats:
    """The formats with these names, where `auto` goes by the chat template and `off` is none.

    Raises:
        ValueError: one is harmony, which tells both, and the other is not.
    """
    template = _template(tokenizer)
    found_calls, found_reasoning = _found(template, CALL_SIGNS), _found(template, REASONING_SIGNS)
    if calls == AUTO:
        calls = HARMONY if reasoning == HARMONY_REASONING else found_calls
    if reasoning == AUTO:
        reasoning = HARMONY_REASONING if calls == HARMONY else found_reasoning
    if (calls == HARMONY) != (reasoning == HARMONY_REASONING):
        raise ValueError(
            f"--tool-call-parser is {calls} and --reasoning-parser is {reasoning}: {HARMONY} and "
            f"{HARMONY_REASONING} are one format, and go together only"
        )
    return AnswerFormats(
        next((known for known in CALL_FORMATS if calls in known.names), None),
        next((known for known in REASONING_FORMATS if reasoning in known.names), None),
    )


def _found(template: str, signs: tuple[tuple[tuple[str, ...], str], ...]) -> str:
    return next((name for texts, name in signs if all(text in template for text in texts)), OFF)


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """All templates, where there are several."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else "\n".join(template.values())
