"""Answers as the supported families write them, and what they are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# What of a template tells how answers are written.
TEMPLATES = {
    "Qwen3": "<think></think><tool_call>",
    "Qwen3-Coder, Qwen3.5": "<think></think><tool_call>\n<function=f>\n<parameter=a>",
    "GLM-4.5": "<think></think><tool_call>f\n<arg_key>a</arg_key>\n<arg_value>",
    "GLM-4.7, GLM-5": "<think></think><tool_call>f<arg_key>a</arg_key><arg_value>",
    "Kimi-K2": "<think></think><|tool_calls_section_begin|>",
    "MiniMax-M2": "<think></think><minimax:tool_call>",
    "DeepSeek-V3, R1": "<think></think><｜tool▁calls▁begin｜>```json",
    "DeepSeek-V3.1": "<think></think><｜tool▁calls▁begin｜>",
    "DeepSeek-V3.2": "<think></think>｜DSML｜function_calls>",
    "Mistral": "[TOOL_CALLS][{",
    "Mistral, newer": "[THINK][/THINK][TOOL_CALLS]f[ARGS]{",
    "Granite": "<|tool_call|>",
    "Llama": '{"name": "f", "parameters": {}}',
    "gpt-oss": "<|start|>assistant<|channel|>analysis<|message|>",
}
SCHEMAS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "share": {"type": "number"},
            "note": {"type": ["string", "null"]},
            "unit": {"enum": ["C", "F"]},
            "tags": {"type": "array", "items": {"type": "string"}},
            "any": {},
        },
    },
    "now": None,
}


@dataclass(frozen=True)
class Transcript:
    """An answer and what it is made of; calls are name and arguments."""

    family: str
    text: str
    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    thinks: bool = False  # the prompt has opened the reasoning


WEATHER = ("weather", {"city": "Köln", "days": 3})
NOW: tuple[str, Any] = ("now", {})
D = "｜DSML｜"
TRANSCRIPTS = [
    Transcript(
        "Qwen3",
        '<think>\nWhich city?\n</think>\n\nI look.\n<tool_call>\n{"name": "weather", "arguments": '
        '{"city": "Köln", "days": 3}}\n</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n'
        "</tool_call>",
        "I look.",
        "Which city?",
        [WEATHER, NOW],
    ),
    Transcript(
        "Qwen3-Coder, Qwen3.5",
        "Hm.</think>\n\nI look.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n"
        "</function>\n</tool_call>",
        "I look.",
        "Hm.",
        [WEATHER, NOW],
        thinks=True,
    ),
    Transcript(  # the values stand for what the schema says, with their own line breaks, tags and quotes
        "Qwen3-Coder, Qwen3.5",
        '<tool_call>\n<function=weather>\n<parameter=city>\n\n"5"\n</tool_call>\n\n</parameter>\n'
        "<parameter=days>\nmany\n</parameter>\n<parameter=note>\nnull\n</parameter>\n<parameter=unit>\n"
        'C\n</parameter>\n<parameter=tags>\n["a", "</parameter"]\n</parameter>\n<parameter=any>\nTrue\n'
        "</parameter>\n</function>\n</tool_call>",
        calls=[
            (
                "weather",
                {
                    "city": '\n"5"\n</tool_call>\n',
                    "days": "many",
                    "note": None,
                    "unit": "C",
                    "tags": ["a", "</parameter"],
                    "any": True,
                },
            )
        ],
    ),
    Transcript(  # the first tag is left out, as these models do at times
        "Qwen3-Coder, Qwen3.5",
        "I look.\n<function=weather>\n<parameter=share>\n1\n</parameter>\n</function>\n</tool_call>",
        "I look.",
        calls=[("weather", {"share": 1})],
    ),
    Transcript(
        "GLM-4.5",
        "\n<think>Hm.</think>\nI look.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln"
        "</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        "I look.",
        "Hm.",
        [WEATHER, NOW],
    ),
    Transcript(
        "GLM-4.7, GLM-5",
        "</think>I look.<tool_call>weather<arg_key>city</arg_key><arg_value>Köln</arg_value>"
        "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call><tool_call>now</tool_call>",
        "I look.",
        calls=[WEATHER, NOW],
        thinks=True,
    ),
    Transcript(
        "Kimi-K2",
        "<think>Hm.</think>I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:4"
        '<|tool_call_argument_begin|>{"city": "Köln", "days": 3}<|tool_call_end|><|tool_call_begin|>'
        "functions.now:5<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        "I look.",
        "Hm.",
        [WEATHER, NOW],
        ids=["functions.weather:4", "functions.now:5"],
    ),
    Transcript(  # the call ends the reasoning
        "Kimi-K2",
        "<think>Hm.\n<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}"
        "<|tool_call_end|><|tool_calls_section_end|>",
        "",
        "Hm.",
        [NOW],
    ),
    Transcript(
        "MiniMax-M2",
        "Hm.\n</think>\n\nI look.\n<minimax:tool_call>\n"
        '<invoke name="weather">\n<parameter name="city">Köln</parameter>\n<parameter name="days">3'
        '</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        "I look.",
        "Hm.",
        [WEATHER, NOW],
        thinks=True,
    ),
    Transcript(
        "DeepSeek-V3, R1",
        "Hm.\n</think>\n\nI look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
        '```json\n{"city": "Köln", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function'
        "<｜tool▁sep｜>now\n"
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "I look.",
        "Hm.",
        [WEATHER, NOW],
        thinks=True,
    ),
    Transcript(
        "DeepSeek-V3.1",
        "I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        '{"city": "Köln", "days": 3}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "I look.",
        calls=[WEATHER, NOW],
    ),
    Transcript(  # a string is one because it says so, whatever its schema
        "DeepSeek-V3.2",
        f'Hm.</think>I look.\n\n<{D}function_calls>\n<{D}invoke name="weather">\n'
        f'<{D}parameter name="city" string="true">Köln</{D}parameter>\n'
        f'<{D}parameter name="days" string="false">3</{D}parameter>\n'
        f'<{D}parameter name="any" string="true">7</{D}parameter>\n'
        f'</{D}invoke>\n<{D}invoke name="now">\n</{D}invoke>\n</{D}function_calls>',
        "I look.",
        "Hm.",
        [("weather", {"city": "Köln", "days": 3, "any": "7"}), NOW],
        thinks=True,
    ),
    Transcript(
        "Mistral",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln", "days": 3}}, '
        '{"name": "now", "arguments": {}}]',
        calls=[WEATHER, NOW],
    ),
    Transcript(
        "Mistral, newer",
        '[THINK]Hm.[/THINK]I look.[TOOL_CALLS]weather[ARGS]{"city": "Köln", "days": 3}'
        "[TOOL_CALLS]now[CALL_ID]abc123def[ARGS]{}",
        "I look.",
        "Hm.",
        [WEATHER, NOW],
    ),
    Transcript(
        "Granite",
        '<|tool_call|>[{"name": "weather", "arguments": {"city": "Köln", "days": 3}}, {"name": "now"}]',
        calls=[WEATHER, NOW],
    ),
    Transcript(
        "Llama",
        '\n{"name": "weather", "parameters": {"city": "Köln", "days": 3}}; {"name": "now", "parameters": {}}',
        calls=[WEATHER, NOW],
    ),
    Transcript(
        "Llama",
        '<|python_tag|>{"type": "function", "name": "weather", "parameters": {"city": "Köln", "days": 3}}',
        calls=[WEATHER],
    ),
    Transcript(
        "gpt-oss",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
        "<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        '{"city": "Köln", "days": 3}',
        "I look.",
        "Hm.",
        [WEATHER],
    ),
    Transcript(  # the recipient may stand with the role, and a call may say nothing
        "gpt-oss",
        " to=functions.now<|channel|>commentary json<|message|><|call|>",
        calls=[NOW],
    ),
    Transcript(
        "gpt-oss",
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>analysis<|message|>Two.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Yes.\n",
        "Yes.\n",
        "One.\n\nTwo.",
    ),
    Transcript("gpt-oss", "Just text.", "Just text."),
]
# Of what is no call, or no whole one, nothing is lost.
BROKEN = [
    Transcript(
        "Mistral, newer", '[TOOL_CALLS]now[ARGS]{"a": "[/THINK]"}', calls=[("now", {"a": "[/THINK]"})]
    ),
    Transcript(
        "GLM-4.5",
        "<tool_call>now\n<arg_key>a</think>\n</arg_key>\n<arg_value></think></arg_value>\n</tool_call>",
        calls=[("now", {"a</think>": "</think>"})],
    ),
    Transcript("Qwen3-Coder, Qwen3.5", text := "<tool_call>\nnothing\n</tool_call> so", text),
    Transcript("Qwen3-Coder, Qwen3.5", text := "The tag <function=\nis broken>", text),
    Transcript("Qwen3-Coder, Qwen3.5", text := "<tool_call>\n<function=now>\n", text),
    Transcript("GLM-4.5", text := "The tag <tool_call> opens a call.", text),
    Transcript("GLM-4.5", text := "<tool_call></tool_call>", text),
    Transcript("Kimi-K2", text := "<|tool_calls_section_begin|>none<|tool_calls_section_end|> so", text),
    Transcript(
        "MiniMax-M2", text := "<minimax:tool_call>\n<invoke name=now>\n</invoke>\n</minimax:tool_call>", text
    ),
    Transcript("DeepSeek-V3.1", text := "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather", text),
    Transcript("DeepSeek-V3.2", text := f"<{D}function_calls>\n</{D}function_calls>", text),
    Transcript("Mistral", text := "[TOOL_CALLS] is a token", text),
    Transcript("Mistral, newer", text := "[TOOL_CALLS]weather", text),
    Transcript("Granite", text := "<|tool_call|>[1, 2]", text),
    Transcript("Llama", text := '{"city": "Köln"} is JSON', text),
    Transcript("Llama", text := "{x} is none\n", text),
    Transcript("Llama", text := 'Write {"name": "now", "parameters": {}}', text),
    Transcript("gpt-oss", "<|channel|>final<|message|>Use <|channel|> so", "Use <|channel|> so"),
]
CUT_OFF = [
    ("Qwen3-Coder, Qwen3.5", "<tool_call>\n<function=weather>\n<parameter=city>\nKö", '{"city": "Kö'),
    ("GLM-4.5", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Kö", '{"city": "Kö'),
    (
        "Kimi-K2",
        '<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city": "Kö',
        '{"city": "Kö',
    ),
    (
        "DeepSeek-V3, R1",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"ci',
        '{"ci',
    ),
    ("Mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Kö', '{"city": "Kö'),
    ("Llama", '{"name": "weather", "parameters": {"city": "Kö', '{"city": "Kö'),
    ("gpt-oss", '<|channel|>commentary to=functions.weather json<|message|>{"city": "Kö', '{"city": "Kö'),
]
