"""Log probabilities by token: none is lost where tokens read alike or are no text."""

from __future__ import annotations

from functools import cache

import tokenizers
from tokenizers import decoders, models

from engine.output import TokenLogprob
from engine.tokenizer.tokenizer import Tokenizer
from server.openai.logprobs import CompletionLogprobs, chat_logprobs, echoed_logprobs

WORDS = ["<unk>", "▁a", "a", "<0x61>", "<0xE2>", "<0x82>", "<0xAC>", "<0xF0>"]
SPACE_A, A, BYTE_A, E2, X82, XAC, XF0 = range(1, 8)
NOWHERE = len(WORDS) + 3  # a row of the model that the tokenizer lacks


@cache
def tokenizer() -> Tokenizer:
    """Words and bytes as in SentencePiece: the byte 0x61 reads as the word `a`."""
    vocab = {word: i for i, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(made, bos_token_id=None, add_bos=False)


def top_of(chosen: int, *top: tuple[int, float]) -> dict[str, float]:
    token = TokenLogprob(chosen, dict(top).get(chosen, -9.0), top)
    (found,) = CompletionLogprobs(tokenizer()).render([(chosen, token)])["top_logprobs"]
    return dict(found)


def test_bytes_that_are_no_text_each_have_a_key() -> None:
    assert top_of(E2, (E2, -1.0), (XF0, -2.0), (X82, -3.0)) == {
        r"bytes:\xe2": -1.0,
        r"bytes:\xf0": -2.0,
        r"bytes:\x82": -3.0,
    }


def test_of_tokens_that_read_alike_the_chosen_one_has_the_text() -> None:
    assert top_of(BYTE_A, (A, -1.0), (BYTE_A, -2.0), (SPACE_A, -3.0)) == {
        "token_id:2": -1.0,
        "a": -2.0,
        " a": -3.0,
    }


def test_else_the_likeliest_has_it() -> None:
    assert top_of(SPACE_A, (A, -1.0), (BYTE_A, -2.0)) == {"a": -1.0, "token_id:3": -2.0, " a": -9.0}


def test_rows_without_a_token_are_told_apart() -> None:
    assert top_of(A, (A, -1.0), (NOWHERE, -2.0), (NOWHERE + 1, -3.0)) == {
        "a": -1.0,
        "": -2.0,
        f"token_id:{NOWHERE + 1}": -3.0,
    }


def test_the_chosen_token_is_among_the_alternatives_by_the_text_it_has() -> None:
    ids = (E2, X82, XAC, BYTE_A)
    lists = CompletionLogprobs(tokenizer()).render((i, TokenLogprob(i, -float(i), ((A, -0.5),))) for i in ids)

    assert lists["tokens"] == [r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac", "a"]
    assert [top[token] for token, top in zip(lists["tokens"], lists["top_logprobs"], strict=True)] == [
        -float(i) for i in ids
    ]
    assert lists["text_offset"] == [0, 0, 0, 1]  # of "€a"


def test_a_chat_lists_the_bytes_of_each_token() -> None:
    first, second = chat_logprobs(
        tokenizer(), [TokenLogprob(E2, -1.0, ((E2, -1.0), (XF0, -2.0))), TokenLogprob(SPACE_A, -1.0)]
    )

    assert (first["token"], first["bytes"]) == (r"bytes:\xe2", [0xE2])
    assert [(t["token"], t["bytes"]) for t in first["top_logprobs"]] == [
        (r"bytes:\xe2", [0xE2]),
        (r"bytes:\xf0", [0xF0]),
    ]
    assert (second["token"], second["bytes"]) == (" a", [0x20, 0x61])


def test_offsets_pass_over_special_tokens_that_the_text_is_told_without() -> None:
    made = tokenizer()
    made.backend.add_special_tokens(["<end>"])
    special = Tokenizer(made.backend, bos_token_id=None, add_bos=False)
    tokens = [(i, TokenLogprob(i, -1.0)) for i in (A, special.added_tokens["<end>"], A, A)]

    told = CompletionLogprobs(special).render(tokens)["text_offset"]
    untold = CompletionLogprobs(special, start=3, skip_special=True).render(tokens)["text_offset"]

    assert (told, untold) == ([0, 1, 6, 7], [3, 4, 4, 5])


def test_offsets_of_a_prompt_do_not_count_the_space_that_its_tokenizer_puts_in_front() -> None:
    tokens = [(SPACE_A, None), (A, TokenLogprob(A, -1.0)), (SPACE_A, TokenLogprob(SPACE_A, -1.0))]

    assert echoed_logprobs(tokenizer(), "aa a", tokens)["text_offset"] == [0, 1, 2]
