"""DeepSeek V3.2's prompts, as a template: its release describes them in Python code and has none.

A question ends with the tag that opens reasoning, or with the one that closes it; only answers behind the
last question keep theirs. Without the vendor's wording for tools there is no place for them here; calls and
results of a history are rendered.
"""

from __future__ import annotations

MODEL_TYPES = ("deepseek_v32", "deepseek32")

TEMPLATE = r"""
{%- set thinks = thinking if thinking is defined else enable_thinking | default(true) %}
{%- set mark = '｜DSML｜' %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{{- '<｜begin▁of▁sentence｜>' }}
{%- for message in messages %}
    {%- set tag = '<think>' if thinks and loop.index0 >= ns.last else '</think>' %}
    {%- if message.role == 'system' %}
        {{- message.content }}
    {%- elif message.role == 'user' %}
        {{- '<｜User｜>' ~ message.content ~ '<｜Assistant｜>' ~ tag }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning = (message.reasoning_content or '') ~ '</think>' %}
        {{- (reasoning if thinks and loop.index0 > ns.last else '') ~ (message.content or '') }}
        {%- if message.tool_calls %}
            {{- '\n\n<' ~ mark ~ 'function_calls>' }}
            {%- for call in message.tool_calls %}
                {{- '\n<' ~ mark ~ 'invoke name="' ~ call.function.name ~ '">\n' }}
                {%- for key, value in call.function.arguments.items() %}
                    {%- set kind, text = ('true', value) if value is string else ('false', value | tojson) %}
                    {{- '<' ~ mark ~ 'parameter name="' ~ key ~ '" string="' ~ kind ~ '">' ~ text }}
                    {{- '</' ~ mark ~ 'parameter>\n' }}
                {%- endfor %}
                {{- '</' ~ mark ~ 'invoke>' }}
            {%- endfor %}
            {{- '\n</' ~ mark ~ 'function_calls>' }}
        {%- endif %}
        {{- '<｜end▁of▁sentence｜>' }}
    {%- elif message.role == 'tool' %}
        {%- if not loop.previtem or loop.previtem.role != 'tool' %}{{- '\n\n<function_results>' }}{% endif %}
        {{- '\n<result>' ~ message.content ~ '</result>' }}
        {%- if not loop.nextitem or loop.nextitem.role != 'tool' %}
            {{- '\n</function_results>\n\n' ~ tag }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
"""
