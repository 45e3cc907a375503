"""What models write, by the definitions of their formats, and what it means.

Each text stands beside its meaning: content, reasoning, and calls with their arguments as text.
"""

from typing import NamedTuple

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "units": {"type": "array", "items": {"type": "string"}},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["city"],
}
TOOLS = {"get_weather": WEATHER, "now": {"type": "object", "properties": {}}, "f.g-2": {}}


class Meaning(NamedTuple):
    """Of an answer."""

    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    reasoning: str = ""


PARIS = ("get_weather", '{"city": "Paris"}')
NESTED = '{"city": "S\\u00e3o \\"P\\" 🦙", "units": ["{", "]"], "deep": {"a": [{"b": [1, 2.5e3, null]}]}}'
NOW = ("now", "{}")

HERMES = [
    (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        Meaning("", (PARIS,)),
    ),
    (
        'Let me see.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\nSo.',
        Meaning("Let me see.\nSo.", (PARIS, NOW)),
    ),
    ('<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>', Meaning("", (PARIS,))),
    (
        f'<tool_call>{{"name": "get_weather", "arguments": {NESTED}}}</tool_call>',
        Meaning("", (("get_weather", NESTED),)),
    ),
    (f'<tool_call>{{"arguments": {NESTED}, "name": "now"}}</tool_call>', Meaning("", (("now", NESTED),))),
    ('<tool_call>{"name": "now"}</tool_call>', Meaning("", (NOW,))),
    ('<tool_call>{"name": "now", "arguments": null, "id": 7}</tool_call>', Meaning("", (NOW,))),
    (
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        Meaning("", (PARIS,)),
    ),
    (
        '<tool_call>{"name": "f.g-2", "arguments": {"a": "漢字 </tool_call> {"}, "type": "x"}</tool_call>',
        Meaning("", (("f.g-2", '{"a": "漢字 </tool_call> {"}'),)),
    ),
    # What is no call is content, to the letter.
    ("Hello, <tool", Meaning("Hello, <tool")),
    ("Use <tool_call> to call a tool.\n", Meaning("Use <tool_call> to call a tool.\n")),
    ("<tool_call>\n{oops}\n</tool_call>", Meaning("<tool_call>\n{oops}\n</tool_call>")),
    ('<tool_call>{"name": "a b", "arguments": {}}', Meaning('<tool_call>{"name": "a b", "arguments": {}}')),
    ('<tool_call>{"name": "now", "arguments": [1]}', Meaning('<tool_call>{"name": "now", "arguments": [1]}')),
    ('<tool_call>{"name": "now", "argu', Meaning('<tool_call>{"name": "now", "argu')),
    (
        '<tool_call>{"arguments": {"a": NaN}, "name": "now"}',
        Meaning('<tool_call>{"arguments": {"a": NaN}, "name": "now"}'),
    ),
    (
        '<tool_call>oops <tool_call>{"name": "now", "arguments": {}}</tool_call>',
        Meaning("<tool_call>oops", (NOW,)),
    ),
    (" \n a  \n", Meaning(" \n a  \n")),
    ("\n\n", Meaning("\n\n")),
    # One that has begun is a call, as far as it was written.
    (
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Pa\\',
        Meaning("", (("get_weather", '{"city": "Pa\\'),)),
    ),
    ('<tool_call>{"name": "now", "arguments": {}', Meaning("", (NOW,))),
    ('<tool_call>{"name": "now", "arguments": {}} and', Meaning("and", (NOW,))),
]
LLAMA = [
    ('{"name": "get_weather", "parameters": {"city": "Paris"}}', Meaning("", (PARIS,))),
    ('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', Meaning("", (PARIS,))),
    (
        '{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "now", "parameters": {}}',
        Meaning("", (PARIS, NOW)),
    ),
    (
        'I look.<|python_tag|>{"name": "now", "parameters": {}}\n{"name": "now", "arguments": {}}',
        Meaning("I look.", (NOW, NOW)),
    ),
    (f'{{"name": "get_weather", "parameters": {NESTED}}}', Meaning("", (("get_weather", NESTED),))),
    ('{"name": "Ann", "parameters": {"age": 3}}', Meaning('{"name": "Ann", "parameters": {"age": 3}}')),
    ('{"a": 1}\n', Meaning('{"a": 1}\n')),
    ("{", Meaning("{")),
    ('<|python_tag|>brave.call(query="x")', Meaning('<|python_tag|>brave.call(query="x")')),
    ('So: {"name": "now", "parameters": {}}', Meaning('So: {"name": "now", "parameters": {}}')),
    ('{"name": "get_weather", "parameters": {"city": "P', Meaning("", (("get_weather", '{"city": "P'),))),
]
MISTRAL = [
    ('[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]', Meaning("", (PARIS,))),
    (
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"arguments": {}, "name": "now"}]',
        Meaning("", (PARIS, NOW)),
    ),
    ('[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', Meaning("", (PARIS,))),
    (
        'So.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[CALL_ID]a1b2c3d4e[ARGS]{}',
        Meaning("So.", (PARIS, NOW)),
    ),
    ('[TOOL_CALLS]get_weather{"city": "Paris"}', Meaning("", (PARIS,))),
    (f"[TOOL_CALLS]get_weather[ARGS]{NESTED}", Meaning("", (("get_weather", NESTED),))),
    ("[TOOL_CALLS]now", Meaning("[TOOL_CALLS]now")),
    ("[TOOL_CALLS]now[ARGS]oops", Meaning("[TOOL_CALLS]now[ARGS]oops")),
    ("[TOOL_CALLS][1, 2]", Meaning("[TOOL_CALLS][1, 2]")),
    ("A list [TOOL", Meaning("A list [TOOL")),
    ('[TOOL_CALLS]get_weather[ARGS]{"city": "P', Meaning("", (("get_weather", '{"city": "P'),))),
]
GLM = [
    (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
        Meaning("", (PARIS,)),
    ),
    (
        'So.\n<tool_call>get_weather<arg_key>city</arg_key><arg_value>1"\\ \n<b></arg_value>'
        "<arg_key>days</arg_key><arg_value>3</arg_value>"
        '<arg_key>units</arg_key><arg_value>["C", "F"]</arg_value><arg_key>note</arg_key>'
        "<arg_value>null</arg_value></tool_call>\n<tool_call>now\n</tool_call>",
        Meaning(
            "So.",
            (
                ("get_weather", '{"city": "1\\"\\\\ \\n<b>", "days": 3, "units": ["C", "F"], "note": null}'),
                NOW,
            ),
        ),
    ),
    (
        "<tool_call>f.g-2\n<arg_key>a</arg_key>\n<arg_value>True</arg_value>\n<arg_key>b</arg_key>\n"
        "<arg_value>so it is</arg_value>\n</tool_call>",
        Meaning("", (("f.g-2", '{"a": true, "b": "so it is"}'),)),
    ),
    ("<tool_call>now</tool_call>", Meaning("", (NOW,))),
    ("The mark <tool_call>is</b>", Meaning("The mark <tool_call>is</b>")),
    ("<tool_call>get_weather\nand so", Meaning("<tool_call>get_weather\nand so")),
    (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Par",
        Meaning("", (("get_weather", '{"city": "Par'),)),
    ),
    (
        "<tool_call>get_weather\n<arg_key>days</arg_key>\n<arg_value>1",
        Meaning("", (("get_weather", '{"days": '),)),
    ),
]
QWEN_CODER = [
    (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        Meaning("", (PARIS,)),
    ),
    (
        "So.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nline\n\n  line 2\n\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n<parameter=note>\nnull\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        Meaning("So.", (("get_weather", '{"city": "line\\n\\n  line 2\\n", "days": 3, "note": null}'), NOW)),
    ),
    ("<function=get_weather><parameter=city>Paris</parameter></function>", Meaning("", (PARIS,))),
    ("A <function=f and <tool_call>", Meaning("A <function=f and <tool_call>")),
    ("<tool_call>\n<function=now>\nsays", Meaning("<tool_call>\n<function=now>\nsays")),
    (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nPar\n",
        Meaning("", (("get_weather", '{"city": "Par\\n'),)),
    ),
]
DEEPSEEK = [
    (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n'
        "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        Meaning("", (PARIS, NOW)),
    ),
    (
        'So.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}'
        "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        Meaning("So.", (PARIS, NOW)),
    ),
    (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{NESTED}<｜tool▁call▁end｜>",
        Meaning("", (("get_weather", NESTED),)),
    ),
    ("<｜tool▁calls▁begin｜>oops", Meaning("<｜tool▁calls▁begin｜>oops")),
    ("<｜tool▁call▁begin｜>now<｜tool▁sep｜>so", Meaning("<｜tool▁call▁begin｜>now<｜tool▁sep｜>so")),
    ("<｜tool▁call", Meaning("<｜tool▁call")),
    (
        '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "P',
        Meaning("", (("get_weather", '{"city": "P'),)),
    ),
]
HARMONY = [
    (
        "<|channel|>analysis<|message|>The user asks.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is 2.<|return|>",
        Meaning("It is 2.", (), "The user asks."),
    ),
    (
        "<|channel|>analysis<|message|>I need it. <|end|><|start|>assistant"
        "<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        Meaning("", (PARIS,), "I need it."),
    ),
    (
        '<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}',
        Meaning("", (PARIS,)),
    ),
    (
        " to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>"
        '{"city": "Paris"}<|call|>',
        Meaning("", (PARIS,)),
    ),
    (
        "<|channel|>commentary<|message|>First a plan.<|end|><|start|>assistant"
        "<|channel|>commentary to=functions.now"
        "<|message|><|call|>",
        Meaning("First a plan.", (NOW,)),
    ),
    (
        "<|channel|>commentary<|message|>A plan.<|end|><|start|>assistant<|channel|>final<|message|>So.",
        Meaning("A plan.\nSo."),
    ),
    (
        "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
        Meaning("", (), "print(1)"),
    ),
    (
        '<|channel|>commentary to=functions.get_weather<|message|>{"city": "P',
        Meaning("", (("get_weather", '{"city": "P'),)),
    ),
    ("<|channel|>analysis<|message|>Thinking, ", Meaning("", (), "Thinking,")),
    ("to be or not", Meaning("to be or not")),
    ("Plain <|text|>.\n", Meaning("Plain <|text|>.\n")),
    ("<|channel|>final", Meaning("<|channel|>final")),
]
TEXTS = {
    "hermes": HERMES,
    "llama3_json": LLAMA,
    "mistral": MISTRAL,
    "mistral_v11": MISTRAL,
    "glm45": GLM,
    "qwen3_coder": QWEN_CODER,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v31": DEEPSEEK,
    "openai": HARMONY,
}
