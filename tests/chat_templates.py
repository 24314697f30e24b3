"""Chat templates in the manner of the common families, small and in words of our own, and their control tokens."""

HERMES = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}Tools, one a line:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
Write <tool_call>{"name": ..., "arguments": ...}</tool_call> to call one.<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}{% for m in messages %}{% if m.role == 'system' and loop.first %}{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}<|im_start|>assistant
"""
LLAMA = """<|begin_of_text|>{% set ns = namespace(tools=tools) %}{% for m in messages %}<|start_header_id|>{{
'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>

{% if m.role == 'user' and ns.tools %}Answer with a function call in JSON.
{% for tool in ns.tools %}{{ tool | tojson(indent=2) }}
{% endfor %}{% set ns.tools = none %}{% endif %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{
raise_exception('one call at a time') }}{% endif %}{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{
m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}{{
'<|start_header_id|>assistant<|end_header_id|>' }}

"""
MISTRAL = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set
rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% set ns = namespace(n=0) %}{%
for m in rest %}{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}{% if
(m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('user and assistant must alternate') }}{% endif %}{%
set ns.n = ns.n + 1 %}{% endif %}{% if m.role == 'user' %}{% if tools and loop.first %}[AVAILABLE_TOOLS] {{
tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{
first + '\n\n' if first and loop.first else '' }}{{ m.content }}[/INST]{%
elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('no')
}}{% endif %}{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}{{
', ' if not loop.last }}{% endfor %}]</s>{% elif m.role == 'tool' %}[TOOL_RESULTS] {"content": {{ m.content | tojson
}}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{
raise_exception('unknown role') }}{% endif %}{% endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{%
for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif
%}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}<start_of_turn>model
"""
PLAIN = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
LAST_ONLY = """{% for m in messages %}{% if m.role == 'system' and not loop.first %}{% else %}[{{ m.role }}]{{ m.content
}}{% if m.name %}({{ m.name }}){% endif %}{% endif %}{% endfor %}[assistant]"""
"""It says names, and leaves out late system messages."""
CLOSE = "{% for m in messages %}<{{ m.content }}>{% endfor %}<|im_start|>"
"""Texts stand close to what the template writes."""

TEMPLATES = {
    "hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "gemma": GEMMA, "plain": PLAIN, "last_only": LAST_ONLY,
    "close": CLOSE, "none": None,
}  # fmt: skip
TOKENS = (
    "<tool_call>", "</tool_call>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "</s>", "<start_of_turn>", "<end_of_turn>", "<think>",
)  # fmt: skip
