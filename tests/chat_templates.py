"""Chat templates with tools, written for tests in the manner of those that models have, not copied from any.

What they differ in is what matters: where tools stand, whether a tool's result is a text or JSON, whether
arguments are an object or a text, and whether past reasoning is left out.
"""

QWEN3 = """
{%- if tools %}{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{- '# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}
{{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- set last = namespace(user=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}
{%- if m.reasoning_content and loop.index0 > last.user %}
{{- '<think>\n' + m.reasoning_content.strip() + '\n</think>\n\n' }}{% endif %}
{{- m.content }}
{%- for call in m.tool_calls %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}
"""

LLAMA31 = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}
{%- set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|head|>system<|end|>\n\n' + system + '<|eot|>' }}
{%- if tools %}{% set first = messages[0].content | trim %}{% set messages = messages[1:] %}
{{- '<|head|>user<|end|>\n\nThese functions may be called:\n' }}
{%- for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}
{{- first + '<|eot|>' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|head|>ipython<|end|>\n\n' }}
{{- m.content | tojson if m.content is iterable else m.content }}{{ '<|eot|>' }}
{%- elif m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{{- '<|head|>assistant<|end|>\n\n{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson }}{{ '}<|eot|>' }}
{%- else %}{{ '<|head|>' + m.role + '<|end|>\n\n' + m.content | trim + '<|eot|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|end|>\n\n' }}{% endif %}
"""

MISTRAL = """
{{- bos_token }}
{%- set last = namespace(user=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and loop.index0 == last.user %}
{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'system' %}{{ '[SYSTEM]' + m.content + '[/SYSTEM]' }}
{%- elif m.tool_calls %}{{ '[TOOL_CALLS][' }}
{%- for call in m.tool_calls %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- ', "id": "' + call.id + '"}' }}{{ ', ' if not loop.last }}{% endfor %}
{{- ']' + eos_token }}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS]{"content": ' + m.content | tojson }}
{{- ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif %}{% endfor %}
"""

GLM = """
{{- '[gMASK]<sop>' }}
{%- if tools %}{{ '<|system|>\n# Tools' }}
{%- for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|user|>\n' + m.content }}
{%- elif m.role == 'system' %}{{ '<|system|>\n' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<|assistant|>' }}
{{- '\n<think>' + (m.reasoning_content or '') | trim + '</think>' }}
{%- if m.content.strip() %}{{ '\n' + m.content.strip() }}{% endif %}
{%- for call in m.tool_calls %}{{ '\n<tool_call>' + call.function.name }}
{%- for key, value in call.function.arguments.items() %}
{{- '\n<arg_key>' + key + '</arg_key>\n<arg_value>' }}
{{- value if value is string else value | tojson }}{{ '</arg_value>' }}{% endfor %}
{{- '\n</tool_call>' }}{% endfor %}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|observation|>' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}
{{- '\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}{% endif %}
"""

DEEPSEEK = """
{{- bos_token }}
{%- for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}
{%- if tools %}{{ '\n\n## Tools\n' }}
{%- for tool in tools %}{{ tool.function | tojson + '\n' }}{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'assistant' %}
{%- if messages[loop.index0 - 1].role == 'user' %}{{ '<|Assistant|></think>' }}{% endif %}
{{- m.content }}
{%- for call in m.tool_calls %}
{{- '<|call|>' + call.function.name + '<|sep|>' + call.function.arguments + '<|/call|>' }}{% endfor %}
{{- '<|end|>' }}
{%- elif m.role == 'tool' %}{{ '<|output|>' + m.content + '<|/output|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role == 'user' %}{{ '<|Assistant|>' }}
{{- '<think>' if thinking is defined and thinking else '</think>' }}{% endif %}
"""

GPT_OSS = """
{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '\n<|end|>' }}
{%- set orders = messages[0].role in ('developer', 'system') %}
{%- if orders or tools %}{{ '<|start|>developer<|message|>' }}
{%- if orders %}{{ '# Instructions\n\n' + messages[0].content + '\n\n' }}{% endif %}
{%- for tool in tools or [] %}
{{- 'type ' + tool.function.name + ' = ' + tool.function.parameters | tojson + ';\n' }}{% endfor %}
{{- '<|end|>' }}{% endif %}
{%- set called = namespace(name='') %}
{%- for m in (messages[1:] if orders else messages) %}
{%- if m.role == 'assistant' %}
{%- if m.tool_calls %}
{%- if m.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{%- set call = m.tool_calls[0].function %}{% set called.name = call.name %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments | tojson }}{{ '<|call|>' }}
{%- else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- elif m.role == 'tool' %}
{{- '<|start|>functions.' + called.name + ' to=assistant<|channel|>commentary<|message|>' }}
{{- m.content | tojson + '<|end|>' }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""

WITH_TOOLS = {
    "qwen3": QWEN3,
    "llama31": LLAMA31,
    "mistral": MISTRAL,
    "glm": GLM,
    "deepseek": DEEPSEEK,
    "gpt_oss": GPT_OSS,
}
for _name in WITH_TOOLS:
    WITH_TOOLS[_name] = WITH_TOOLS[_name].strip()
