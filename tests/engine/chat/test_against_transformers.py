"""Chat templates render byte for byte as `transformers` renders them, and become the same tokens."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from engine.chat.template import TemplateChat
from engine.tokenizer.tokenizer import Tokenizer
from quant.errors import RequestError

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow  # the import takes seconds

# Small templates, one in the manner of each family, that use of Jinja what the released ones use: reversed
# walks with a namespace, macros that call themselves, slices, loops that are left, string methods, JSON with
# and without indentation, dates, filters over lists, exceptions, white space that counts, marks for training.
FOLDER = Path(__file__).parent / "templates"
TEMPLATES = {file.stem: file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.jinja"))}
BOS, EOS = "<s>", "</s>"
CONTROL = [
    BOS, EOS, "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|start|>",
    "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|eot_id|>", "[INST]", "[/INST]", "<｜User｜>",
    "[TOOL_CALLS]", "[e~[", "<|end_of_text|>",
]  # fmt: skip
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What is it like? <Ä> & 'so' \"on\"",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Où?"},
                    "days": {"type": ["integer", "null"]},
                    "units": {"type": "array", "items": {"enum": ["C", "F"]}},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {}}},
]


def call(id_: str, name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


ASKED = {"role": "user", "content": " Wie heiß ist es in Köln? <b>\n"}
LOOKING = {
    "role": "assistant",
    "content": "I look.",
    "tool_calls": [call("abcdef123", "weather", city="Köln <&>", days=3, units=["C"], more={"ü": None})],
}
SILENT = {"role": "assistant", "tool_calls": [call("abcdef124", "now")]}
TWICE = {
    "role": "assistant",
    "reasoning_content": "Both.",
    "tool_calls": [call("abcdef125", "now"), call("abcdef126", "weather", city="Rome")],
}
WARM = {"role": "tool", "tool_call_id": "abcdef123", "content": '{"t": 31, "at": "noon"}'}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [ASKED],
    "a system prompt": [{"role": "system", "content": "Be kind.\n"}, ASKED],
    "turns": [ASKED, {"role": "assistant", "content": "Hot. "}, {"role": "user", "content": "And now?"}],
    "reasoning": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "reasoning_content": "\nEasy.\n", "content": "\n2"},
        {"role": "user", "content": "+ 1?"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\n3"},
        {"role": "user", "content": "Thanks."},
    ],
    "a call": [ASKED, LOOKING, WARM],
    "a call without a word": [ASKED, SILENT, {**WARM, "tool_call_id": "abcdef124"}],
    "reasoning before calls": [
        {"role": "system", "content": "S"},
        ASKED,
        TWICE,
        {"role": "tool", "tool_call_id": "abcdef125", "content": "12:00"},
        {"role": "tool", "tool_call_id": "abcdef126", "content": "25"},
    ],
    "calls, then turns": [ASKED, LOOKING, WARM, {"role": "assistant", "content": "31."}, ASKED],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}]}],
}
READ_PARTS = ("qwen3.5", "glm", "kimi")
SWITCHES: dict[str, dict[str, Any]] = {
    "as they come": {},
    "no thinking": {"enable_thinking": False, "thinking": False},
    "thinking": {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"},
}


@cache
def backend() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token) for token in CONTROL])
    made.add_tokens([AddedToken(token, normalized=False) for token in MARKUP])
    return made


@cache
def chat(template: str) -> TemplateChat:
    known = backend()
    bos, eos = known.token_to_id(BOS), known.token_to_id(EOS)
    named = {"bos_token": BOS, "eos_token": EOS}
    tokenizer = Tokenizer(known, bos_token_id=bos, add_bos=False, eos_token_id=eos, special_tokens=named)
    return TemplateChat(tokenizer, template)


@cache
def reference(template: str) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend(), bos_token=BOS, eos_token=EOS, chat_template=template
    )


def ours(template: str, request: dict[str, Any]) -> list[int]:
    return chat(template).render(request).token_ids


def theirs(template: str, messages: list[dict[str, Any]], **more: Any) -> list[int]:
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    ids: list[int] = reference(template).apply_chat_template(copy.deepcopy(messages), **how, **more)
    return ids


def as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with arguments as they are in OpenAI's interface."""
    written = copy.deepcopy(messages)
    for each in (each for message in written for each in message.get("tool_calls", ())):
        each["function"]["arguments"] = json.dumps(each["function"]["arguments"], ensure_ascii=False)
    return written


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_conversations_are_rendered_as_transformers_does(
    family: str, tools: list[dict[str, Any]] | None, switches: str
) -> None:
    template, rendered = TEMPLATES[family], 0
    for name, messages in CONVERSATIONS.items():
        if name == "parts" and family not in READ_PARTS:
            continue  # others write lists as Python does; here they get one text
        text = as_text(messages)
        request = {"messages": text, "tools": tools, "chat_template_kwargs": SWITCHES[switches]}
        # Templates that take arguments as text are given text there, too.
        conversation = text if family == "deepseek" else messages
        try:
            expected = theirs(template, conversation, tools=tools, **SWITCHES[switches])
        except Exception:  # whatever a template may raise; ours may go on with messages in another shape
            with suppress(RequestError):
                ours(template, request)
            continue
        assert ours(template, request) == expected, name
        rendered += 1

    assert rendered >= 5


def test_documents_are_rendered_as_transformers_does() -> None:
    documents = [{"title": "b", "text": "Zwei"}, {"title": "a", "text": "one"}]
    request = {"messages": [ASKED], "documents": documents}

    expected = theirs(TEMPLATES["granite"], [ASKED], documents=documents)
    assert ours(TEMPLATES["granite"], request) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% for m in messages %}{% generation %}{{ loop.index }}{% endgeneration %}{% endfor %}",
        "{{ namespace(a=1).a }}{{ dict(a=messages[0].role) }}{{ messages[0] | tojson(indent=2) }}",
        "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ tools is none }}{{ documents }}",
    ],
)
def test_details_are_those_of_transformers(template: str) -> None:
    messages: list[dict[str, Any]] = [ASKED, {**SILENT, "content": None}]

    assert ours(template, {"messages": as_text(messages)}) == theirs(template, messages)


ENDS = {
    "glm": ["<|user|>", "<|observation|>"],
    "gpt-oss": ["<|call|>"],
    "granite": ["<|end_of_text|>"],
    "kimi": ["<|im_end|>"],
    "llama": ["<|eot_id|>"],
    "minimax": ["[e~["],
    "qwen3": ["<|im_end|>"],
    "qwen3.5": ["<|im_end|>"],
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_answers_end_where_the_template_ends_turns(family: str) -> None:
    prompt = chat(TEMPLATES[family]).render({"messages": [ASKED]})

    ends = [backend().id_to_token(i) for i in prompt.stop_token_ids]
    assert ends == [EOS, *ENDS.get(family, [])]
