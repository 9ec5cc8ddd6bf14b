"""Which spelling of tool calls and reasoning a chat template teaches, told by the markers in it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.chat.call_block import END_TOOL_CALL, TOOL_CALL, JsonCalls
from engine.chat.call_forms import CallForm
from engine.chat.element_calls import ElementCalls
from engine.chat.harmony import CHANNEL, CONSTRAIN, END, MESSAGE, START
from engine.chat.output_parser import END_THINK, THINK
from engine.chat.section_calls import SectionCalls
from engine.grammar.call_spellings import DSML, ElementSpelling, JsonSpelling, SectionSpelling, dsml
from engine.grammar.tools import CallSpelling

THINK_TAGS = ((THINK, END_THINK), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True)
class Calls:
    """How calls are read from answers, and how a grammar has them written.

    gap     what stands between content and the first call
    """

    form: CallForm
    spelling: CallSpelling
    gap: str = ""


def calls_of(template: str) -> Calls | None:
    """The spelling of calls that a template (Jinja source) teaches; None where it is none that is known."""
    for markers, calls in _BY_MARKERS:
        if all(marker in template for marker in markers):
            return calls
    return None


def writes_messages(template: str) -> bool:
    """Whether answers are written in gpt-oss' channels."""
    return START in template and CHANNEL in template and MESSAGE in template


def think_tags_of(template: str) -> tuple[str, str] | None:
    """The tags around reasoning; None where the template knows none."""
    return next((tags for tags in THINK_TAGS if tags[1] in template), None)


HARMONY = SectionSpelling(
    f"{CHANNEL}commentary to=functions.", behind=f" {CONSTRAIN}json{MESSAGE}", alone=True
)
HARMONY_REASONING = (f"{CHANNEL}analysis{MESSAGE}", f"{END}{START}assistant")
HARMONY_CONTENT = f"{CHANNEL}final{MESSAGE}"


def _invokes(spelling: ElementSpelling, gap: str) -> Calls:
    # The reader looks for the tags that are written, without the white space around them.
    form = ElementCalls(
        spelling.begin.strip(),
        spelling.end,
        spelling.parameter,
        spelling.end_parameter,
        spelling.call,
        spelling.end_call.strip(),
    )
    return Calls(form, spelling, gap)


def _dsml(block: str) -> Calls:
    # DeepSeek V3.2, and V4 where a GGUF file brings a template for it.
    return _invokes(dsml(block), gap="\n\n")


def _deepseek(*, fences: bool) -> Calls:
    # V3 and R1 put the arguments into fences, V3.1 does not.
    call, separator, end_call = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    form = SectionCalls(begin, separator, call, end_call, end, fences=True)
    spelling = SectionSpelling(
        begin,
        before=f"{call}function{separator}" if fences else call,
        behind="\n```json\n" if fences else separator,
        end_call="\n```" + end_call if fences else end_call,
        between="\n" if fences else "",
        end=end,
    )
    return Calls(form, spelling)


def _kimi() -> Calls:
    call, separator, end_call = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
    begin, end = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    form = SectionCalls(begin, separator, call, end_call, end, numbers=True, ends_reasoning=True)
    spelling = SectionSpelling(
        begin, before=f"{call}functions.", behind=separator, end_call=end_call, end=end, numbers=True
    )
    return Calls(form, spelling)


def _minimax() -> Calls:
    spelling = ElementSpelling(
        "<minimax:tool_call>\n", '<invoke name="', '">\n', '<parameter name="', '">', '">',
        "</parameter>", "</invoke>\n", "</minimax:tool_call>",
    )  # fmt: skip
    return _invokes(spelling, gap="\n")


def _qwen_elements() -> Calls:
    call, parameter, end_parameter = "<function=", "<parameter=", "</parameter>"
    form = ElementCalls(
        TOOL_CALL, END_TOOL_CALL, parameter, end_parameter, call, "</function>", padded=True, may_skip=True
    )
    spelling = ElementSpelling(
        TOOL_CALL, f"\n{call}", ">\n", parameter, ">\n", ">\n", end_parameter, "</function>\n",
        end=END_TOOL_CALL, padding="\n", between=f"{END_TOOL_CALL}\n{TOOL_CALL}",
    )  # fmt: skip
    return Calls(form, spelling)


def _glm(*, breaks: bool) -> Calls:
    # GLM-4.5 and 4.6 put everything on a line of its own, later ones put nothing between.
    line = "\n" if breaks else ""
    form = ElementCalls(
        TOOL_CALL, END_TOOL_CALL, "<arg_key>", "</arg_value>", end_key="</arg_key>", value="<arg_value>"
    )
    behind_key = f"</arg_key>{line}<arg_value>"
    spelling = ElementSpelling(
        TOOL_CALL, "", line, "<arg_key>", behind_key, behind_key, "</arg_value>", "",
        end=END_TOOL_CALL, behind_parameter=line, between=f"{END_TOOL_CALL}{line}{TOOL_CALL}",
    )  # fmt: skip
    return Calls(form, spelling)


# One object between a pair of tags, as Qwen3 and Hermes write it; taught where a template teaches nothing.
TAUGHT = Calls(
    JsonCalls(),
    JsonSpelling(
        TOOL_CALL,
        before="\n",
        between=f"\n{END_TOOL_CALL}\n{TOOL_CALL}\n",
        after=f"\n{END_TOOL_CALL}",
    ),
)


def _list(begin: str) -> Calls:
    return Calls(JsonCalls(begin, None), JsonSpelling(begin, before="[", after="]"))


# The first entry of which a template has all markers.
_BY_MARKERS: tuple[tuple[tuple[str, ...], Calls], ...] = (
    ((DSML, "function_calls"), _dsml("function_calls")),
    ((DSML, "tool_calls>"), _dsml("tool_calls")),
    (("<｜tool▁calls▁begin｜>", "```json"), _deepseek(fences=True)),
    (("<｜tool▁calls▁begin｜>",), _deepseek(fences=False)),
    (("<|tool_calls_section_begin|>",), _kimi()),
    (("<minimax:tool_call>",), _minimax()),
    ((TOOL_CALL, "<function="), _qwen_elements()),
    ((TOOL_CALL, "<arg_key>", "</arg_key><arg_value>"), _glm(breaks=False)),
    ((TOOL_CALL, "<arg_key>"), _glm(breaks=True)),
    ((TOOL_CALL,), TAUGHT),
    (
        ("[TOOL_CALLS]", "[ARGS]"),
        Calls(
            SectionCalls("[TOOL_CALLS]", "[ARGS]", call_id="[CALL_ID]"),
            SectionSpelling("[TOOL_CALLS]", behind="[ARGS]", between="[TOOL_CALLS]"),
        ),
    ),
    (("[TOOL_CALLS]",), _list("[TOOL_CALLS]")),
    (("<|tool_call|>",), _list("<|tool_call|>")),
    (
        ('{"name": ', '"parameters": '),
        Calls(
            JsonCalls("<|python_tag|>", None, is_bare=True),
            JsonSpelling('{"name": ', between="; ", arguments="parameters", alone=True),
        ),
    ),
)  # fmt: skip
