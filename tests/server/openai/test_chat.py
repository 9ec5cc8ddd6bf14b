"""Chat completions, as the real OpenAI SDK sees them."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.server.harness import LociServer

QUESTION: list[Any] = [{"role": "user", "content": "Hello"}]
MODEL = "v41-c"


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    plain: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    return client.chat.completions.create(**(plain | fields))


def text_of(message: Any) -> str:
    """Everything the model wrote; the tiny model never ends its reasoning unless thinking is off."""
    return (getattr(message, "reasoning_content", None) or "") + (message.content or "")


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = ask(client)

    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_reasoning_is_kept_apart_from_content(client: openai.OpenAI) -> None:
    thinking = ask(client)
    plain = ask(client, reasoning_effort="none")

    assert thinking.choices[0].message.reasoning_content
    assert not thinking.choices[0].message.content
    assert thinking.usage.completion_tokens_details.reasoning_tokens == 8
    assert plain.choices[0].message.content
    assert not hasattr(plain.choices[0].message, "reasoning_content")
    assert plain.usage.completion_tokens_details.reasoning_tokens == 0


def test_streamed_pieces_add_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True))

    assert "".join(text_of(c.choices[0].delta) for c in chunks) == text_of(whole.choices[0].message)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1


def test_a_stream_ends_with_the_usage_where_asked_for(client: openai.OpenAI) -> None:
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})

    assert last.choices == []
    assert last.usage.completion_tokens == 8
    assert all(c.usage is None for c in chunks)


def test_the_async_sdk_streams_many_answers_at_once(server: LociServer) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=12, seed=seed, stream=True
        )
        return "".join([text_of(chunk.choices[0].delta) async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            return await asyncio.gather(*(one(client, seed) for seed in (1, 2, 3, 4, 5, 6, 1, 2)))

    answers = asyncio.run(all_of_them())

    assert answers[:2] == answers[6:]
    assert len(set(answers)) == 6


def test_a_seed_makes_an_answer_reproducible(client: openai.OpenAI) -> None:
    answers = {text_of(ask(client, temperature=1, seed=7).choices[0].message) for _ in range(3)}

    assert len(answers) == 1


def test_several_choices_have_seeds_that_count_up(client: openai.OpenAI) -> None:
    together = ask(client, temperature=1, seed=20, n=3)
    alone = ask(client, temperature=1, seed=22)

    texts = [text_of(choice.message) for choice in together.choices]
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[2] == text_of(alone.choices[0].message)
    assert together.usage.completion_tokens == 24
    assert together.usage.prompt_tokens == alone.usage.prompt_tokens


def test_several_choices_are_streamed_side_by_side(client: openai.OpenAI) -> None:
    whole = ask(client, temperature=1, seed=20, n=2)
    texts = {0: "", 1: ""}
    reasons = []
    for chunk in ask(client, temperature=1, seed=20, n=2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += text_of(choice.delta)
        reasons.append(choice.finish_reason)

    assert list(texts.values()) == [text_of(choice.message) for choice in whole.choices]
    assert reasons.count("length") == 2


def test_logprobs_tell_tokens_bytes_and_alternatives(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3, max_tokens=5)

    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 5
    for token in tokens:
        spelled = bytes(token.bytes)
        assert token.token in (
            spelled.decode(errors="replace"),
            "bytes:" + "".join(f"\\x{b:02x}" for b in spelled),
        )
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)  # temperature 0
        assert [t.logprob for t in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )


def test_streamed_logprobs_are_the_same_as_whole_ones(client: openai.OpenAI) -> None:
    whole = ask(client, logprobs=True).choices[0].logprobs.content
    chunks = ask(client, logprobs=True, stream=True)

    streamed = [token for c in chunks for token in c.choices[0].logprobs.content]
    assert [t.token for t in streamed] == [t.token for t in whole]
    assert [t.logprob for t in streamed] == pytest.approx([t.logprob for t in whole], abs=1e-4)


def test_a_streamed_piece_comes_with_the_log_probabilities_of_its_tokens(client: openai.OpenAI) -> None:
    first, *pieces = ask(client, logprobs=True, stream=True, reasoning_effort="none")

    assert (first.choices[0].delta.role, first.choices[0].logprobs.content) == ("assistant", [])
    for piece in pieces:
        spelled = b"".join(bytes(token.bytes) for token in piece.choices[0].logprobs.content)
        assert spelled.decode(errors="replace") == (piece.choices[0].delta.content or "")


def test_logit_bias_forces_a_token(client: openai.OpenAI) -> None:
    answer = ask(client, logit_bias={"300": 100}, logprobs=True, max_tokens=4)

    assert len({t.token for t in answer.choices[0].logprobs.content}) == 1


def test_a_stop_string_ends_the_answer_and_is_not_shown(client: openai.OpenAI) -> None:
    fields = {"reasoning_effort": "none", "max_tokens": 20}
    whole = ask(client, **fields).choices[0].message.content
    stop = whole[10:13]
    expected = whole[: whole.index(stop)]

    answer = ask(client, stop=stop, **fields)
    streamed = ask(client, stop=["never there", stop], stream=True, **fields)

    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == expected


def test_a_stop_string_is_shown_where_asked_for(client: openai.OpenAI) -> None:
    whole = text_of(ask(client).choices[0].message)
    stop = whole[3:6]
    answer = ask(client, stop=stop, extra_body={"include_stop_str_in_output": True}).choices[0]

    assert text_of(answer.message) == whole[: whole.index(stop) + len(stop)]
    assert answer.finish_reason == "stop"


def test_min_tokens_hold_the_end_back(client: openai.OpenAI) -> None:
    pushed = {"logit_bias": {"1": 100}, "extra_body": {"min_tokens": 5}}  # 1 is the end of sequence
    answer = ask(client, **pushed)

    assert answer.usage.completion_tokens == 6
    assert answer.choices[0].finish_reason == "stop"


def test_top_k_of_minus_one_is_off(client: openai.OpenAI) -> None:
    drawn = [
        text_of(ask(client, temperature=1, seed=5, extra_body={"top_k": k}).choices[0].message)
        for k in (0, -1)
    ]

    assert drawn[0] == drawn[1]


def test_the_last_message_is_continued_in_vllms_words_too(client: openai.OpenAI) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "The"}]
    theirs = {"continue_final_message": True, "add_generation_prompt": False}
    ours = ask(client, messages=[*begun[:-1], begun[-1] | {"prefix": True}])

    answer = ask(client, messages=begun, extra_body=theirs)
    assert answer.choices[0].message == ours.choices[0].message
    assert answer.usage.prompt_tokens == ours.usage.prompt_tokens


def test_max_completion_tokens_is_the_current_name_of_max_tokens(client: openai.OpenAI) -> None:
    answer = ask(client, max_completion_tokens=3, max_tokens=openai.omit)

    assert answer.usage.completion_tokens == 3


@pytest.mark.slow
def test_without_a_limit_the_context_is_the_limit(client: openai.OpenAI) -> None:
    long_question = [{"role": "user", "content": "word " * 640}]
    answer = ask(client, messages=long_question, max_tokens=openai.omit, extra_body={"ignore_eos": True})

    assert answer.usage.total_tokens == 2048
    assert answer.choices[0].finish_reason == "length"


def test_text_parts_and_the_developer_role_are_understood(client: openai.OpenAI) -> None:
    newer = ask(
        client,
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
    )
    older = ask(client, messages=[{"role": "system", "content": "Be kind."}, *QUESTION])

    assert text_of(newer.choices[0].message) == text_of(older.choices[0].message)
    assert newer.usage.prompt_tokens == older.usage.prompt_tokens


def test_tools_and_their_history_are_part_of_the_prompt(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    history = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]

    bare = ask(client).usage.prompt_tokens
    with_tools = ask(client, tools=[tool]).usage.prompt_tokens
    with_history = ask(client, tools=[tool], messages=history).usage.prompt_tokens

    assert bare < with_tools < with_history


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    for effort in ("none", "low"):
        answer = ask(client, reasoning_effort=effort).choices[0].message

        went_on = ask(client, messages=[*QUESTION, answer, *QUESTION])

        assert text_of(went_on.choices[0].message)


@pytest.mark.parametrize("content", [None, "", []])
def test_an_assistant_may_have_said_nothing(client: openai.OpenAI, content: object) -> None:
    silent = {"role": "assistant", "content": content}

    answer = ask(client, messages=[*QUESTION, silent, *QUESTION])

    assert answer.usage.completion_tokens == 8


def test_a_refusal_in_the_history_is_text(client: openai.OpenAI) -> None:
    def after(part: dict[str, str]) -> Any:
        return ask(client, messages=[*QUESTION, {"role": "assistant", "content": [part]}, *QUESTION])

    refused = after({"type": "refusal", "refusal": "No."})
    said = after({"type": "text", "text": "No."})

    assert text_of(refused.choices[0].message) == text_of(said.choices[0].message)


def test_the_sdks_stream_helper_sees_every_piece(client: openai.OpenAI) -> None:
    whole = ask(client, reasoning_effort="none", max_tokens=20).choices[0].message.content
    expected = whole[: whole.index(whole[10:13])]
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, temperature=0, reasoning_effort="none", stop=whole[10:13]
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()

    assert "".join(deltas) == expected
    assert final.choices[0].message.content == expected


def test_fields_without_meaning_here_are_ignored(client: openai.OpenAI) -> None:
    plain = ask(client)
    dressed = ask(
        client,
        user="someone",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        prompt_cache_key="k",
        response_format={"type": "text"},
        extra_body={"nobody_knows_this": [1, 2, 3]},
    )

    assert text_of(dressed.choices[0].message) == text_of(plain.choices[0].message)


def test_models_are_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data

    assert model.id == MODEL
    assert model.to_dict()["max_model_len"] == 2048
    assert client.models.retrieve(MODEL) == model


def test_earlier_turns_are_reported_as_cached(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": "Does anybody else ask just this?"}
    salt = {"cache_salt": "a chat"}  # other tests' prompts begin as this one does
    first = ask(client, messages=[question], extra_body=salt)
    turns = [question, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Good."}]
    *_, last = ask(
        client, messages=turns, stream=True, stream_options={"include_usage": True}, extra_body=salt
    )

    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert 0 < last.usage.prompt_tokens_details.cached_tokens <= first.usage.prompt_tokens


def test_what_a_client_expects_changes_nothing_but_is_counted(client: openai.OpenAI) -> None:
    # So long that a server tries a draft, whatever it has learned from the answers before.
    options = {"max_tokens": 200, "reasoning_effort": "none", "extra_body": {"ignore_eos": True}}
    plain = ask(client, **options)
    expected = text_of(plain.choices[0].message)
    told = [{"type": "text", "text": expected}]
    foretold = ask(client, **options, prediction={"type": "content", "content": told})

    assert text_of(foretold.choices[0].message) == expected
    assert foretold.usage.completion_tokens == plain.usage.completion_tokens
    counted = foretold.usage.completion_tokens_details
    assert counted.accepted_prediction_tokens + counted.rejected_prediction_tokens > 0
    assert plain.usage.completion_tokens_details.accepted_prediction_tokens is None
