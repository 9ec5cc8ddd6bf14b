"""What the tests of llama.cpp's server ask of OpenAI's routes and of its own that Loci has."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import Any

import httpx

from tests.clients.others.checks import CHAT, PLAIN, RESPONSES, SAY, TEXT, Asked, Suite, texts_of

LLAMA_CPP = Suite("llama.cpp: tools/server/tests/unit")
BASIC, COMPLETION, RESPONSE = "test_basic.py", "test_completion.py", "test_compat_oai_responses.py"
CONVERSATION, TOKENS, SHIFT = "test_chat_completion.py", "test_tokenize.py", "test_ctx_shift.py"
NATIVE = "at `/v1/completions`, without fields of `/completion`"
LIFE: dict[str, Any] = {"prompt": "I believe the meaning of life is", "max_tokens": 8}
END = 1  # the token that ends the model's answers
TRUE = {"type": "object", "properties": {"success": {"const": True}}, "required": ["success"]}
TOOL = {"type": "function", "function": {"name": "test", "description": "", "parameters": TRUE}}


@LLAMA_CPP.test(BASIC, "test_server_start_simple", "test_server_start_with_host_family")
def _health(ask: Asked) -> None:
    assert ask.http.get("/health").status_code == 200


@LLAMA_CPP.test(BASIC, "test_server_props", "test_server_slots", note="without flags and `.gguf`")
def _settings(ask: Asked) -> None:
    settings, slots = ask.get("/props"), ask.get("/slots")
    assert settings["total_slots"] == len(slots) == 4
    assert {slot["n_ctx"] for slot in slots} == {settings["default_generation_settings"]["n_ctx"]} == {2048}
    assert not any("params" in slot for slot in slots)


@LLAMA_CPP.test(BASIC, "test_server_models")
def _models(ask: Asked) -> None:
    assert [model["id"] for model in ask.get("/models")["data"]] == ["v41-c"]


@LLAMA_CPP.test(BASIC, "test_no_webui", note="the page; there is no flag against it")
def _page(ask: Asked) -> None:
    assert "<!doctype html>" in ask.http.get("/").text.lower()


@LLAMA_CPP.test(CONVERSATION, "test_chat_completion", note="no `system_fingerprint`")
def _chat(ask: Asked) -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "the best book"}]
    for content in ("Hey", parts):
        turns = [{"role": "system", "content": "Book"}, {"role": "user", "content": content}]
        answer = ask.post("/chat/completions", **PLAIN | {"messages": turns, "model": None})
        choice = answer["choices"][0]
        assert "cmpl" in answer["id"]
        assert answer["usage"]["prompt_tokens"] > 8 == answer["usage"]["completion_tokens"]
        assert (choice["message"]["role"], choice["finish_reason"]) == ("assistant", "length")
        assert choice["message"]["content"]


@LLAMA_CPP.test(CONVERSATION, "test_chat_completion_stream", note="the first `content` is empty, not null")
def _chat_stream(ask: Asked) -> None:
    wanted = {"temperature": 0, "stream_options": {"include_usage": True}}
    first, *events = ask.events("/chat/completions", **PLAIN | wanted)
    *pieces, ending, counts = events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {event["id"] for event in events} == {first["id"]}
    assert not any("role" in event["choices"][0]["delta"] for event in (*pieces, ending))
    assert {event["choices"][0]["finish_reason"] for event in pieces} == {None}
    assert (ending["choices"][0]["delta"], ending["choices"][0]["finish_reason"]) == ({}, "length")
    assert counts["usage"]["completion_tokens"] == 8
    assert "".join(texts_of(events)) == ask.post(CHAT, **PLAIN)["choices"][0]["message"]["content"]


@LLAMA_CPP.test(CONVERSATION, "test_chat_completion_with_openai_library")
def _chat_library(ask: Asked) -> None:
    answer = ask.sdk.chat.completions.create(
        model="gpt-3.5-turbo-instruct", **PLAIN | {"seed": 42, "temperature": 0.8}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content


@LLAMA_CPP.test(CONVERSATION, "test_apply_chat_template", note="with the template of the model served")
def _template(ask: Asked) -> None:
    turns = [{"role": "system", "content": "You are a test."}, {"role": "user", "content": "Hi there"}]
    prompt = ask.post("/apply-template", messages=turns)["prompt"]
    assert prompt.index("You are a test.") < prompt.index("Hi there")


@LLAMA_CPP.test(CONVERSATION, "test_completion_with_response_format", note="the prompt says JSON")
def _formats(ask: Asked) -> None:
    def content(wanted: dict[str, Any]) -> str:
        turns = [{"role": "user", "content": "Write an example in JSON"}]
        fields = {"messages": turns, "max_tokens": 300, "response_format": wanted}
        answer = ask.post(CHAT, **PLAIN | fields)
        return str(answer["choices"][0]["message"]["content"])

    assert json.loads(content({"type": "json_object", "schema": {"const": "42"}})) == "42"
    assert json.loads(content({"type": "json_schema", "json_schema": {"schema": {"const": "foo"}}})) == "foo"
    assert content({"type": "json_object"}).startswith("{")
    wrong: list[Any] = [123, {"type": 123}, {"type": "hiccup"}]
    for schema in wrong:
        ask.refused(CHAT, **PLAIN, response_format={"type": "json_object", "schema": schema})
    ask.refused(CHAT, **PLAIN, response_format={"type": "sound"})


@LLAMA_CPP.test(CONVERSATION, "test_invalid_chat_completion_req", note="two answers in a row are no error")
def _invalid(ask: Asked) -> None:
    wrong: list[Any] = [
        None,
        "string",
        [123],
        [{}],
        [{"role": 123}],
        [{"role": "system", "content": 123}],
        [{"role": "system", "content": "test"}, {}],
    ]
    for messages in wrong:
        assert ask.refused("/chat/completions", messages=messages)["message"]


@LLAMA_CPP.test(CONVERSATION, "test_logprobs", "test_logprobs_stream")
def _logprobs(ask: Asked) -> None:
    wanted = PLAIN | {"model": "v41-c", "logprobs": True, "top_logprobs": 10}
    choice = ask.sdk.chat.completions.create(**wanted).choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert all(t.logprob <= 0 and t.bytes is not None and len(t.top_logprobs) == 10 for t in tokens)
    said = b"".join(bytes(t.bytes or ()) for t in tokens)
    assert said.decode(errors="replace") == choice.message.content
    told = [
        token["bytes"]
        for event in ask.events(CHAT, **wanted)
        for token in (event["choices"][0]["logprobs"] or {}).get("content", ())
    ]
    assert told == [t.bytes for t in tokens]


@LLAMA_CPP.test(CONVERSATION, "test_logit_bias")
@LLAMA_CPP.test(COMPLETION, "test_logit_bias", note="ids as keys, as in OpenAI's API; not texts, not pairs")
def _bias(ask: Asked) -> None:
    free = PLAIN | {"logprobs": True, "return_tokens_as_token_ids": True}
    said = ask.post(CHAT, **free)["choices"][0]["logprobs"]["content"]
    banned = {token["token"].removeprefix("token_id:"): -100 for token in said}
    bound = ask.post(CHAT, **free, logit_bias=banned)["choices"][0]["logprobs"]["content"]
    assert not {token["token"].removeprefix("token_id:") for token in bound} & banned.keys()


@LLAMA_CPP.test(
    CONVERSATION,
    "test_context_size_exceeded",
    "test_context_size_exceeded_stream",
    note="code `context_length_exceeded`, OpenAI's",
)
def _too_long(ask: Asked) -> None:
    for stream in (False, True):
        found = ask.refused("/chat/completions", messages=SAY * 2000, stream=stream)
        assert found["code"] == "context_length_exceeded"
        assert "2048" in found["message"]


@LLAMA_CPP.test(CONVERSATION, "test_return_progress", note="chunks are as the server computes them")
def _progress(ask: Asked) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "This is a test" * 40}], "max_tokens": 2}
    body |= {"cache_salt": "progress"}
    for round_ in range(2):
        events = ask.events("/chat/completions", **body, return_progress=True)
        told = [event["prompt_progress"] for event in events if "prompt_progress" in event]
        assert told[0]["cache"] == told[0]["processed"]
        assert (told[0]["cache"] > 0) == (round_ > 0)
        assert told[-1]["processed"] == told[-1]["total"] > 0


@LLAMA_CPP.test(CONVERSATION, "test_chat_completions_multiple_choices")
def _choices(ask: Asked) -> None:
    choices = ask.post("/chat/completions", **PLAIN, n=2)["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["length"] * 2
    assert all(choice["message"]["role"] == "assistant" for choice in choices)


@LLAMA_CPP.test(COMPLETION, "test_completion", "test_completion_stream", note=NATIVE)
@LLAMA_CPP.test(COMPLETION, "test_completion_stream_vs_non_stream", note=NATIVE)
@LLAMA_CPP.test(COMPLETION, "test_completion_with_openai_library")
@LLAMA_CPP.test(COMPLETION, "test_completion_stream_with_openai_library")
def _completion(ask: Asked) -> None:
    whole = ask.sdk.completions.create(model="davinci-002", **LIFE, temperature=0)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    stream = ask.sdk.completions.create(model="davinci-002", **LIFE, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


@LLAMA_CPP.test(COMPLETION, "test_consistent_result_same_seed", "test_cache_vs_nocache_prompt", note=NATIVE)
@LLAMA_CPP.test(COMPLETION, "test_consistent_result_different_batch_size", note=f"{NATIVE}; beside others")
@LLAMA_CPP.test(COMPLETION, "test_different_result_different_seed", note=NATIVE)
def _seeds(ask: Asked) -> None:
    def said(seed: int) -> str:
        return str(ask.post(TEXT, **LIFE, seed=seed, temperature=1.0)["choices"][0]["text"])

    with ThreadPoolExecutor(4) as together:
        seeds = [1, 2, 3, 4]
        assert list(together.map(said, seeds)) == list(map(said, seeds))
    assert len({said(seed) for seed in seeds}) == 4


@LLAMA_CPP.test(COMPLETION, "test_nocache_long_input_prompt", note=NATIVE)
@LLAMA_CPP.test(SHIFT, "test_ctx_shift_disabled_long_prompt", note=f"{NATIVE}; in other words")
def _long_prompt(ask: Asked) -> None:
    assert ask.refused(TEXT, prompt="I believe the meaning of life is" * 400)["param"] == "prompt"


@LLAMA_CPP.test(SHIFT, "test_ctx_shift_disabled_short_prompt", "test_ctx_shift_disabled_stream", note=NATIVE)
def _fills(ask: Asked) -> None:
    body = {"prompt": [5] * 2000, "ignore_eos": True}
    assert ask.post(TEXT, **body, max_tokens=16)["usage"]["completion_tokens"] == 16
    assert ask.post(TEXT, **body, max_tokens=-1)["usage"]["total_tokens"] == 2048
    *_, last = ask.events(TEXT, **body, max_tokens=256)
    assert last["choices"][0]["finish_reason"] == "length"


@LLAMA_CPP.test("test_ignore_eos.py", "test_ignore_eos_populates_logit_bias", note="that an answer goes on")
def _ignores_eos(ask: Asked) -> None:
    forced = {"prompt": [5], "max_tokens": 8, "logit_bias": {str(END): 100}}
    assert ask.post(TEXT, **forced)["usage"]["completion_tokens"] == 1
    assert ask.post(TEXT, **forced, ignore_eos=True)["usage"]["completion_tokens"] == 8


@LLAMA_CPP.test(
    COMPLETION, "test_completion_with_tokens_input", note=f"{NATIVE}; texts and ids are not mixed"
)
def _ids(ask: Asked) -> None:
    ids = ask.post("/tokenize", content="The meaning of life", add_special=True)["tokens"]
    one = ask.post(TEXT, prompt=ids, temperature=0)["choices"]
    two = ask.post(TEXT, prompt=[ids, ids], temperature=0)["choices"]
    assert [choice["text"] for choice in two] == [one[0]["text"]] * 2


@LLAMA_CPP.test(COMPLETION, "test_completion_parallel_slots", note=NATIVE)
def _parallel(ask: Asked) -> None:
    def said(seed: int) -> str:
        answer = ask.post(TEXT, prompt="Write", max_tokens=200, ignore_eos=True, seed=seed)
        return str(answer["choices"][0]["text"])

    with ThreadPoolExecutor(6) as together:
        running = [together.submit(said, seed) for seed in range(6)]
        busy = 0
        while not all(each.done() for each in running):
            busy = max(busy, sum(slot["is_processing"] for slot in ask.get("/slots")))
        assert all(each.result() for each in running)
    assert 1 <= busy <= 4


@LLAMA_CPP.test(COMPLETION, "test_n_probs", "test_n_probs_stream", note="as `logprobs` of OpenAI's API")
def _n_probs(ask: Asked) -> None:
    body = {"prompt": "Hello", "max_tokens": 5, "temperature": 0, "logprobs": 10}
    told = ask.post(TEXT, **body)["choices"][0]["logprobs"]
    assert len(told["token_logprobs"]) == 5
    assert all(value <= 0 for value in told["token_logprobs"])
    assert all(len(top) == 10 for top in told["top_logprobs"])
    streamed = [event["choices"][0]["logprobs"]["token_logprobs"] for event in ask.events(TEXT, **body)]
    assert list(chain.from_iterable(streamed)) == told["token_logprobs"]


@LLAMA_CPP.test(COMPLETION, "test_cancel_request", note=NATIVE)
def _cancel(ask: Asked) -> None:
    with suppress(httpx.ReadTimeout):
        ask.http.post(TEXT, json={"prompt": "Hi", "max_tokens": 1900, "ignore_eos": True}, timeout=0.2)
    deadline = time.monotonic() + 30
    while any(slot["is_processing"] for slot in ask.get("/slots")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@LLAMA_CPP.test(RESPONSE, "test_responses_with_text_format", note="the prompt says JSON")
def _text_format(ask: Asked) -> None:
    def answer(wanted: dict[str, Any]) -> str:
        fields = {"max_output_tokens": 300, "reasoning": {"effort": "none"}}
        output = ask.post("/responses", input="Write JSON", text={"format": wanted}, **fields)["output"]
        return str(next(item for item in output if item["type"] == "message")["content"][0]["text"])

    assert json.loads(answer({"type": "json_schema", "name": "test", "schema": {"const": "foo"}})) == "foo"
    assert answer({"type": "json_object"}).startswith("{")
    assert answer({"type": "text"})
    ask.refused(RESPONSES, input="Write", text={"format": {"type": "json_schema", "name": "test"}})


@LLAMA_CPP.test(RESPONSE, "test_responses_with_openai_library", "test_responses_stream_with_openai_library")
def _response_library(ask: Asked) -> None:
    fields: dict[str, Any] = {"model": "gpt-4.1", "max_output_tokens": 8, "reasoning": {"effort": "none"}}
    whole = ask.sdk.responses.create(input=[{"role": "user", "content": "Book"}], **fields, temperature=0)
    assert whole.id.startswith("resp_")
    assert str(whole.output[0].id).startswith("msg_")
    said, ids, items = "", set(), set()
    for event in ask.sdk.responses.create(input="Book", **fields, stream=True):
        if event.type == "response.output_text.delta":
            said += event.delta
            items.add(event.item_id)
        if event.type in ("response.created", "response.in_progress", "response.incomplete"):
            ids.add(event.response.id)
        if event.type == "response.incomplete":
            assert event.response.output_text == said
            assert {event.response.output[0].id} == items
    assert said
    assert len(ids) == 1


@LLAMA_CPP.test(
    RESPONSE, "test_responses_stream_with_llama_telemetry", note="`prompt_progress`; no `timings`"
)
def _response_progress(ask: Asked) -> None:
    events = ask.events("/responses", input="A test" * 40, max_output_tokens=4, return_progress=True)
    told = [event for event in events if "prompt_progress" in event]
    assert told
    assert {event["type"] for event in told} == {"response.in_progress"}
    assert all(event["prompt_progress"]["processed"] >= event["prompt_progress"]["cache"] for event in told)
    assert events[-1]["response"]["usage"]


@LLAMA_CPP.test(TOKENS, "test_tokenize_detokenize", "test_tokenize_with_bos", "test_tokenize_with_pieces")
def _tokens(ask: Asked) -> None:
    text = "What is the capital of 媽 🤗 France ?"
    ids = ask.post("/tokenize", content=text)["tokens"]
    assert ask.post("/detokenize", tokens=ids)["content"] == text
    begun = ask.post("/tokenize", content=text, add_special=True)["tokens"]
    assert begun[-len(ids) :] == ids
    pieces = ask.post("/tokenize", content=text, with_pieces=True)["tokens"]
    assert [each["id"] for each in pieces] == ids
    assert all(each["piece"] for each in pieces)


@LLAMA_CPP.test("test_tool_call.py", "test_completion_without_tool_call_fast")
def _no_call(ask: Asked) -> None:
    for more in ({}, {"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "none"}):
        answer = ask.post(CHAT, **PLAIN | more)
        assert "tool_calls" not in answer["choices"][0]["message"]


@LLAMA_CPP.test(
    "test_tool_call.py", "test_completion_with_required_tool_tiny_fast", note="switched off there"
)
def _required_call(ask: Asked) -> None:
    wanted = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 400}
    (call,) = ask.post(CHAT, **PLAIN | wanted)["choices"][0]["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (
        "test",
        {"success": True},
    )


@LLAMA_CPP.test("test_template.py", "test_add_generation_prompt", note="false is refused by name")
def _generation_prompt(ask: Asked) -> None:
    given = ask.post("/apply-template", messages=SAY, add_generation_prompt=True)
    assert given == ask.post("/apply-template", messages=SAY)
    assert ask.refused("/apply-template", messages=SAY, add_generation_prompt=False)["param"] == (
        "add_generation_prompt"
    )
