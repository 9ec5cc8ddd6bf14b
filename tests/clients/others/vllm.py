"""What the tests of vLLM's server ask of OpenAI's completions routes, and of its own that Loci has."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import jsonschema_rs

from tests.clients.others.checks import CHAT, PLAIN, SAY, TEXT, Asked, Suite, texts_of

VLLM = Suite("vLLM: tests/entrypoints/openai")
TALK, WRITE = "chat_completion/test_chat.py", "completion/test_completion.py"
BIAS = "chat_completion/test_chat_logit_bias_validation.py"
STOPS, BASIC = "chat_completion/test_chat_stop_token_ids_validation.py", "basic/test_basic.py"
SHORT = {"prompt": [5, 6, 7, 8, 9], "max_tokens": 5, "temperature": 0}
PROFILE = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ada", "Alan"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "skills": {"type": "array", "items": {"enum": ["logic", "art"]}, "maxItems": 3},
    },
    "required": ["name", "age", "skills"],
    "additionalProperties": False,
}
ADDRESS = r"((25[0-5]|(2[0-4]|1\d|[1-9]|)\d)\.){3}(25[0-5]|(2[0-4]|1\d|[1-9]|)\d)"
LANGUAGES = ["Python", "Java", "JavaScript", "C++", "C#", "PHP", "TypeScript", "Ruby"]


def choice_of(ask: Asked, path: str = CHAT, **body: Any) -> Any:
    """The first choice of an answer."""
    return ask.post(path, **body)["choices"][0]


@VLLM.test(TALK, "test_no_logprobs_chat", "test_zero_logprobs_chat", "test_some_logprobs_chat")
def _chat_logprobs(ask: Asked) -> None:
    assert choice_of(ask, **PLAIN, logprobs=False)["logprobs"] is None
    for count in (0, 5):
        told = choice_of(ask, **PLAIN, logprobs=True, top_logprobs=count)["logprobs"]["content"]
        assert [len(token["top_logprobs"]) for token in told] == [count] * 8


@VLLM.test(TALK, "test_too_many_chat_logprobs")
@VLLM.test(WRITE, "test_too_many_completion_logprobs")
def _too_many_logprobs(ask: Asked) -> None:
    for count, stream in ((21, True), (30, False)):
        ask.refused(CHAT, **PLAIN, logprobs=True, top_logprobs=count, stream=stream)
        ask.refused(TEXT, **SHORT, logprobs=count, stream=stream)
    assert choice_of(ask, **PLAIN)["message"]["content"] is not None


@VLLM.test(TALK, "test_prompt_logprobs_chat", "test_more_than_one_prompt_logprobs_chat")
@VLLM.test(WRITE, "test_prompt_logprobs_completion")
def _prompt_logprobs(ask: Asked) -> None:
    ask.refused(CHAT, **PLAIN, prompt_logprobs=-1)
    ask.refused(TEXT, **SHORT, prompt_logprobs=-1)
    assert "prompt_logprobs" not in ask.post(CHAT, **PLAIN)
    for count in (1, 2):
        third = ask.post(CHAT, **PLAIN, prompt_logprobs=count)["prompt_logprobs"][2]
        assert count <= len(third) <= count + 1  # and the token itself
    two = SHORT | {"prompt": ["A robot may not", "My name is"], "prompt_logprobs": 0}
    assert all(choice["prompt_logprobs"] for choice in ask.post(TEXT, **two)["choices"])


@VLLM.test(TALK, "test_single_chat_session")
def _session(ask: Asked) -> None:
    answer = ask.post(CHAT, **PLAIN, logprobs=True, top_logprobs=5)
    (choice,) = answer["choices"]
    assert (answer["usage"]["completion_tokens"], choice["finish_reason"]) == (8, "length")
    turns = [*SAY, choice["message"], {"role": "user", "content": "express your result in json"}]
    assert choice_of(ask, **PLAIN | {"messages": turns})["message"]["content"]


@VLLM.test(TALK, "test_chat_streaming", note="the last chunk has no content, as in OpenAI's API")
def _streaming(ask: Asked) -> None:
    whole = choice_of(ask, **PLAIN)
    events = ask.events(CHAT, **PLAIN)
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert [reason for reason in reasons if reason] == [reasons[-1]] == [whole["finish_reason"]]
    assert "".join(texts_of(events)) == whole["message"]["content"]


@VLLM.test(TALK, "test_chat_completion_stream_options", note="no `min_characters`")
@VLLM.test(WRITE, "test_completion_stream_options", note="`continuous_usage_stats` alone is honoured")
def _stream_options(ask: Asked) -> None:
    bodies: tuple[tuple[str, dict[str, Any]], ...] = ((CHAT, PLAIN | {"min_tokens": 8}), (TEXT, SHORT))
    for path, body in bodies:

        def counts(path: str = path, body: dict[str, Any] = body, **options: Any) -> list[Any]:
            return [event.get("usage") for event in ask.events(path, **body, stream_options=options)]

        assert not any(counts() + counts(include_usage=False))
        *before, last = counts(include_usage=True, continuous_usage_stats=False)
        assert not any(before)
        assert last["total_tokens"] == last["prompt_tokens"] + last["completion_tokens"]
        always = counts(include_usage=True, continuous_usage_stats=True)
        made = [each["completion_tokens"] for each in always]
        assert (made, made[-1]) == (sorted(made), body["max_tokens"])
        for options in ({"include_usage": None}, {"include_usage": True}, {"continuous_usage_stats": True}):
            ask.refused(path, **body, stream=False, stream_options=options)


@VLLM.test(TALK, "test_structured_outputs_choice_chat", "test_structured_outputs_choice_chat_logprobs")
def _one_of(ask: Asked) -> None:
    wanted = {"structured_outputs": {"choice": LANGUAGES}, "logprobs": True, "top_logprobs": 5}
    choice = choice_of(ask, **PLAIN | wanted)
    assert choice["message"]["content"] in LANGUAGES
    told = choice["logprobs"]["content"][0]["top_logprobs"]
    assert all(each["logprob"] >= -9999 for each in told)


@VLLM.test(
    TALK,
    "test_structured_outputs_json_chat",
    "test_structured_outputs_regex_chat",
    "test_response_format_json_object",
    "test_response_format_json_schema",
    "test_response_format_text",
    note="the form; what a trained model says in it is not asked",
)
def _forms(ask: Asked) -> None:
    turns = [{"role": "user", "content": "Give an example in JSON"}]

    def said(**fields: Any) -> str:
        return str(
            choice_of(ask, **PLAIN | {"messages": turns, "max_tokens": 500} | fields)["message"]["content"]
        )

    jsonschema_rs.validate(PROFILE, json.loads(said(structured_outputs={"json": PROFILE})))
    named = {"name": "foo_test", "schema": PROFILE}
    jsonschema_rs.validate(
        PROFILE, json.loads(said(response_format={"type": "json_schema", "json_schema": named}))
    )
    assert re.fullmatch(ADDRESS, said(structured_outputs={"regex": ADDRESS}))
    assert said(response_format={"type": "json_object"}).startswith("{")
    assert said(response_format={"type": "text"})


@VLLM.test(TALK, "test_structured_outputs_type_error")
@VLLM.test(WRITE, "test_invalid_json_schema", "test_invalid_regex", "test_invalid_grammar")
def _wrong_forms(ask: Asked) -> None:
    ask.refused(CHAT, **PLAIN, structured_outputs={"regex": {"1": "Python"}})
    wrong: list[Any] = [
        {"json": {"type": "object", "properties": {"foo": "bar"}}},
        {"regex": "[.*"},
        {"grammar": 'root ::= selectinvalidsyntax\nselect ::= "SELECT "'},
    ]
    for form in wrong:
        ask.refused(TEXT, **SHORT, structured_outputs=form)


@VLLM.test(TALK, "test_extra_fields_allowed", "test_complex_message_content")
def _contents(ask: Asked) -> None:
    odd = [{"role": "user", "content": "Hello", "extra_field": "0"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    for turns in (odd, parts):
        said = choice_of(ask, **PLAIN | {"messages": turns})
        assert said["message"] == choice_of(ask, **PLAIN)["message"]


@VLLM.test(TALK, "test_long_seed", note="any integer is a seed")
def _seed(ask: Asked) -> None:
    for seed in (2**63, -(2**63) - 1):
        assert ask.http.post(CHAT, json=PLAIN | {"seed": seed}).status_code in (200, 400)


@VLLM.test(
    TALK,
    "test_chat_completion_n_parameter_non_streaming",
    "test_chat_completion_n_parameter_streaming",
    "test_chat_completion_n_with_seed",
    "test_chat_completion_n_equals_1",
)
def _several(ask: Asked) -> None:
    for n in (1, 2, 3):
        choices = ask.post(CHAT, **PLAIN | {"n": n, "temperature": 0.8, "seed": 42})["choices"]
        assert [choice["index"] for choice in choices] == list(range(n))
        assert len({choice["message"]["content"] for choice in choices}) == n
    events = ask.events(CHAT, **PLAIN | {"n": 2, "temperature": 0.8, "seed": 42})
    said = {
        index: "".join(texts_of([e for e in events if e["choices"][0]["index"] == index])) for index in (0, 1)
    }
    assert all(said.values())


@VLLM.test("chat_completion/test_chat_echo.py", "test_chat_session_with_echo_and_continue_final_message")
def _continued(ask: Asked) -> None:
    saying = "An apple a day, keeps"
    turns = [*SAY, {"role": "assistant", "content": saying}]
    body = PLAIN | {"messages": turns, "continue_final_message": True, "add_generation_prompt": False}
    assert saying not in choice_of(ask, **body)["message"]["content"]
    assert ask.refused(CHAT, **body, echo=True)["param"] == "echo"


@VLLM.test(WRITE, "test_single_completion")
def _single(ask: Asked) -> None:
    answer = ask.post(TEXT, **SHORT, cache_salt="single")
    (choice,) = answer["choices"]
    assert (choice["finish_reason"], answer["usage"]["total_tokens"]) == ("length", 10)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert "prompt_logprobs" not in choice


@VLLM.test(WRITE, "test_no_logprobs", "test_some_logprobs")
@VLLM.test(WRITE, "test_zero_logprobs", note="`top_logprobs` has none of 0")
def _text_logprobs(ask: Asked) -> None:
    assert choice_of(ask, TEXT, **SHORT)["logprobs"] is None
    for count in (0, 5):
        told = choice_of(ask, TEXT, **SHORT, logprobs=count)["logprobs"]
        assert len(told["token_logprobs"]) == 5
        assert all(count <= len(top) <= count + 1 for top in told["top_logprobs"] or ())


@VLLM.test(WRITE, "test_completion_streaming", "test_parallel_no_streaming", "test_parallel_streaming")
def _parallel(ask: Asked) -> None:
    body = {"prompt": "What is an LLM?", "max_tokens": 50, "n": 3, "seed": 42, "temperature": 1.0}
    choices = ask.post(TEXT, **body, logprobs=0)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert len({choice["text"] for choice in choices}) == 3
    said = {0: "", 1: "", 2: ""}
    reasons = []
    for event in ask.events(TEXT, **body):
        choice = event["choices"][0]
        said[choice["index"]] += choice["text"]
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert list(said.values()) == [choice["text"] for choice in choices]
    assert len(reasons) == 3


@VLLM.test(WRITE, "test_batch_completions", note="no beam search: it is refused")
def _batch(ask: Asked) -> None:
    prompts: list[Any] = [["Hello, my name is"] * 2, [[5, 6, 7]] * 2]
    for prompt in prompts:
        body = SHORT | {"prompt": prompt}
        first, second = ask.post(TEXT, **body)["choices"]
        assert first["text"] == second["text"]
        said = ["", ""]
        for event in ask.events(TEXT, **body):
            said[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert said == [first["text"]] * 2
    assert ask.refused(TEXT, **SHORT, use_beam_search=True)["param"] == "use_beam_search"


@VLLM.test(WRITE, "test_echo_logprob_completion")
def _echo(ask: Asked) -> None:
    text = ask.post("/detokenize", tokens=SHORT["prompt"])["prompt"]
    for prompt, count in (("Hello, my name is", 1), (SHORT["prompt"], 0)):
        choice = choice_of(ask, TEXT, **SHORT | {"prompt": prompt}, echo=True, logprobs=count)
        assert choice["text"].startswith(prompt if isinstance(prompt, str) else text)
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None
        assert told["top_logprobs"][0] is None
        lengths = {len(values) for values in told.values()}
        assert len(lengths) == 1
        assert min(lengths) > 5


@VLLM.test("completion/test_prompt_validation.py", "test_empty_prompt", "test_out_of_vocab_token_ids")
def _prompts(ask: Asked) -> None:
    ask.refused(TEXT, prompt=None, max_tokens=5, prompt_embeds=[])
    assert "999999" in ask.refused(TEXT, prompt=[999999], max_tokens=5)["message"]


@VLLM.test(
    BIAS,
    "test_chat_logit_bias_valid",
    "test_chat_logit_bias_invalid",
    "test_chat_logit_bias_non_integer_key",
    "test_chat_logit_bias_non_numeric_value",
    "test_chat_logit_bias_multiple_non_integer_keys",
)
def _bias(ask: Asked) -> None:
    assert choice_of(ask, **PLAIN, logit_bias={"1023": 1.0})["message"]["content"]
    assert "1025" in ask.refused(CHAT, **PLAIN, logit_bias={"1025": 1.0})["message"]
    found = ask.refused(CHAT, **PLAIN, logit_bias={"bad1": 50.0, "bad2": 20.0})["message"]
    assert "bad1" in found
    assert "bad2" in found
    assert "logit_bias" in ask.refused(CHAT, **PLAIN, logit_bias={"1": "not_a_number"})["message"]


@VLLM.test(
    STOPS,
    "test_chat_stop_token_ids_valid",
    "test_chat_stop_token_ids_out_of_vocab",
    "test_chat_stop_token_ids_negative",
)
def _stops(ask: Asked) -> None:
    assert choice_of(ask, **PLAIN, stop_token_ids=[1023])["message"]["content"]
    assert "1025" in ask.refused(CHAT, **PLAIN, stop_token_ids=[1025])["message"]
    ask.refused(CHAT, **PLAIN, stop_token_ids=[-1])


@VLLM.test(BASIC, "test_show_version", "test_check_health")
def _version(ask: Asked) -> None:
    assert ask.get("/version").keys() == {"version"}
    assert ask.http.get("/health").status_code == 200


@VLLM.test(BASIC, "test_request_wrong_content_type")
@VLLM.test(
    "chat_completion/test_non_object_body_validation.py",
    "test_chat_completion_request_rejects_non_object_body",
)
def _bodies(ask: Asked) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert ask.http.post(CHAT, content=json.dumps(PLAIN), headers=form).status_code == 415
    for body in ("this is not valid json{{{", '["not", "an", "object"]', "42", "null"):
        answer = ask.http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400


@VLLM.test(BASIC, "test_request_cancellation", note="with as many requests as may wait")
def _cancelled(ask: Asked) -> None:
    def leave(_: int) -> None:
        body = PLAIN | {"max_tokens": 1900, "ignore_eos": True}
        with suppress(httpx.ReadTimeout):
            ask.http.post(CHAT, json=body, timeout=0.3)

    with ThreadPoolExecutor(16) as together:
        list(together.map(leave, range(16)))
    assert choice_of(ask, **PLAIN)["message"]["content"]
