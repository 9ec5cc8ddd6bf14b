"""Plain completions through the OpenAI SDK: prompts as text or ids, echo, scoring."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import httpx
import openai
import pytest

from engine.tokenizer.tokenizer import Tokenizer
from server.openai.completion_requests import CompletionRequest
from server.openai.completions import tokenize_prompts
from tests.server.harness import ROOT

MODEL = "v41-c"
PROMPT = "The river is"


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    plain: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    return client.completions.create(**(plain | fields))


def ids_of(http: httpx.Client, text: str) -> list[int]:
    ids: list[int] = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    return ids


def test_text_and_its_token_ids_are_continued_alike(client: openai.OpenAI, http: httpx.Client) -> None:
    as_text = complete(client)
    as_ids = complete(client, prompt=ids_of(http, PROMPT))

    assert as_text.object == "text_completion"
    assert as_text.choices[0].text == as_ids.choices[0].text
    assert as_text.usage.total_tokens == as_ids.usage.total_tokens


def test_sixteen_tokens_are_the_default_length(client: openai.OpenAI) -> None:
    assert complete(client, max_tokens=openai.omit).usage.completion_tokens == 16


def test_lists_of_prompts_are_answered_in_order(client: openai.OpenAI, http: httpx.Client) -> None:
    prompts = ["The river is", "Yesterday"]
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in prompts]

    together = complete(client, prompt=prompts)
    as_ids = complete(client, prompt=[ids_of(http, prompt) for prompt in prompts])
    doubled = complete(client, prompt=prompts, n=2)

    assert [choice.text for choice in together.choices] == alone
    assert [choice.text for choice in as_ids.choices] == alone
    assert [choice.text for choice in doubled.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert [choice.index for choice in doubled.choices] == [0, 1, 2, 3]


def test_streamed_pieces_add_up(client: openai.OpenAI) -> None:
    whole = complete(client, echo=True)
    *chunks, last = complete(client, echo=True, stream=True, stream_options={"include_usage": True})

    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage.total_tokens == whole.usage.total_tokens


def test_echo_puts_the_prompt_in_front(client: openai.OpenAI, http: httpx.Client) -> None:
    answer = complete(client).choices[0].text

    assert complete(client, echo=True).choices[0].text == PROMPT + answer
    assert complete(client, echo=True, prompt=ids_of(http, PROMPT)).choices[0].text == PROMPT + answer


def test_logprobs_come_as_parallel_lists(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=2).choices[0]

    lists = choice.logprobs
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.text_offset) == 6
    assert all(2 <= len(top) <= 3 for top in lists.top_logprobs)
    assert lists.text_offset[0] == 0
    assert lists.text_offset == sorted(lists.text_offset)


def test_echoed_logprobs_cover_the_prompt(client: openai.OpenAI, http: httpx.Client) -> None:
    ids = ids_of(http, PROMPT)
    choice = complete(client, prompt=ids, echo=True, logprobs=1).choices[0]

    lists = choice.logprobs
    assert len(lists.tokens) == len(ids) + 6
    assert "".join(lists.tokens[: len(ids)]) == PROMPT
    assert lists.token_logprobs[0] is None
    assert all(value < 0 for value in lists.token_logprobs[1:])


def test_a_prompt_can_be_scored_without_generating(client: openai.OpenAI) -> None:
    scored = complete(client, echo=True, logprobs=1, max_tokens=0)
    continued = complete(client, echo=True, logprobs=1, max_tokens=4)

    prompt_tokens = scored.usage.prompt_tokens
    assert scored.choices[0].text == PROMPT
    assert scored.choices[0].finish_reason == "length"
    assert scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(
        continued.choices[0].logprobs.token_logprobs[1:prompt_tokens], abs=1e-4
    )


def test_best_of_equal_to_n_changes_nothing(client: openai.OpenAI) -> None:
    assert complete(client, n=2, best_of=2).choices[1].text == complete(client).choices[0].text


def test_prompts_seen_before_are_reported_as_cached(client: openai.OpenAI) -> None:
    prompts = ["A prompt that nobody else sends.", "And one more of this kind."]
    new = complete(client, prompt=prompts[0]).usage
    again = complete(client, prompt=prompts[0]).usage
    salted = complete(client, prompt=prompts[0], extra_body={"cache_salt": "mine"}).usage
    both = complete(client, prompt=prompts, n=2).usage

    assert new.prompt_tokens_details.cached_tokens == 0
    assert again.prompt_tokens_details.cached_tokens == again.prompt_tokens == new.prompt_tokens
    assert salted.prompt_tokens_details.cached_tokens == 0
    # All prompts share the token they begin with.
    assert new.prompt_tokens <= both.prompt_tokens_details.cached_tokens <= new.prompt_tokens + 1


def test_texts_begin_as_the_tokenizer_says_unless_they_are_not_to() -> None:
    tokenizer = Tokenizer.from_directory(ROOT / "deploy" / "demo" / "loci-demo")  # one that adds a token
    served: Any = SimpleNamespace(loaded=SimpleNamespace(tokenizer=tokenizer), vocab_size=tokenizer.size)

    def ids(**fields: Any) -> list[int]:
        request = CompletionRequest(model=MODEL, prompt=PROMPT, **fields)
        return tokenize_prompts(request, served, "")[0].token_ids

    assert ids() == [tokenizer.bos_token_id, *ids(add_special_tokens=False)]


def test_a_prompt_that_spells_its_beginning_gets_no_second_one_and_is_echoed_whole() -> None:
    tokenizer = Tokenizer.from_directory(ROOT / "deploy" / "demo" / "loci-demo")
    served = cast(
        Any, SimpleNamespace(loaded=SimpleNamespace(tokenizer=tokenizer), vocab_size=tokenizer.size)
    )
    spelled = tokenizer.special_tokens["bos_token"] + PROMPT

    request = CompletionRequest(model=MODEL, prompt=[PROMPT, spelled])
    plain, spelling = tokenize_prompts(request, served, "")

    assert plain.token_ids == spelling.token_ids
    assert (plain.added, spelling.added) == (1, 0)


@pytest.mark.slow
def test_a_prompt_that_is_too_long_is_called_by_its_name(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": [5] * 4000}).json()["error"]

    assert (answer["param"], answer["code"]) == ("prompt", "context_length_exceeded")
