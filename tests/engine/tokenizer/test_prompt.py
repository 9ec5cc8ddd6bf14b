"""Prompts are encoded as `transformers` encodes their text, except that text never makes a control token.

`transformers` gives a rendered chat to the `tokenizers` library whole, so the library is the judge; the
values under RECORDED are those of `transformers` 5.24 itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from engine.chat.template import TemplateChat
from engine.tokenizer.prompt import pattern_of
from engine.tokenizer.tokenizer import Tokenizer
from quant.errors import RequestError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %} <|user|>{% endif %}"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = ["▁", *"abcdehlnorsu<>|/\n", "he", "ll", "hell", "hello", "▁hello", "▁a", "</s>", "</"]
SPECIAL = ["<s>", "</s>", "<|user|>", "<|end|>"]
TEXTS = st.lists(
    st.sampled_from(
        ["hello", " ", "  ", "\n", "\n\n", "a", "A", "bé", "🐟", "<", "|", "ﬁ", "▁", "<br>", "ab", "0"]
    )
).map("".join)


def bpe(pre_tokenizer: pre_tokenizers.PreTokenizer | None = None) -> tokenizers.Tokenizer:
    """SentencePiece's kind of BPE: bytes for what has no word."""
    vocab = {token: i for i, token in enumerate(["<unk>", *BYTES, *LETTERS])}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "a"), ("<", "/")]
    made = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    return made


def unigram(scheme: str) -> tokenizers.Tokenizer:
    """A model in which `</s>` is a word like any other, and the likeliest."""
    words = [("<unk>", -9.0), *((letter, -5.0 / len(letter)) for letter in LETTERS)]
    made = tokenizers.Tokenizer(models.Unigram(words, 0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    return made


def byte_level(adds_space: bool) -> tokenizers.Tokenizer:
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(models.BPE({**vocab, "he": 256, "ll": 257}, [("h", "e"), ("l", "l")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    return made


def prepending() -> tokenizers.Tokenizer:
    made = bpe()
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def folding() -> tokenizers.Tokenizer:
    made = byte_level(False)
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return made


def metaspace(scheme: str, split: bool) -> tokenizers.Tokenizer:
    return bpe(pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split))


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    **{
        f"metaspace {scheme} {split}": partial(metaspace, scheme, split)
        for scheme in ("first", "always", "never")
        for split in (True, False)
    },
    **{f"unigram {scheme}": partial(unigram, scheme) for scheme in ("first", "always", "never")},
    "bytes": lambda: byte_level(False),
    "bytes behind a space": lambda: byte_level(True),
    "prepending normalizer": prepending,
    "folding normalizer": folding,
}
MORE = {
    "plain": [],
    "strip": [
        AddedToken("<br>", lstrip=True, normalized=False),
        AddedToken("hello", rstrip=True, normalized=False),
    ],
    "words": [AddedToken("ab", single_word=True), AddedToken("  ", normalized=False), AddedToken("\n\n")],
    "normalized": [AddedToken("a", normalized=True), AddedToken(" hello", normalized=True)],
}


@cache
def tokenizer(kind: str, more: str = "plain", strips: bool = False, normalized: bool = False) -> Tokenizer:
    made = KINDS[kind]()
    made.decoder = decoders.ByteLevel() if kind.startswith("bytes") else decoders.Replace("▁", " ")
    made.add_special_tokens([AddedToken(t, rstrip=strips, normalized=normalized) for t in SPECIAL])
    made.add_tokens(MORE[more])
    bos = made.token_to_id("<s>")
    return Tokenizer(made, bos_token_id=bos, add_bos=False, special_tokens={"bos_token": "<s>"})


def chat(made: Tokenizer, *texts: str) -> list[int]:
    messages = [{"role": "user", "content": text} for text in texts]
    return TemplateChat(made, TEMPLATE).render({"messages": messages}).token_ids


def rendered(*texts: str) -> str:
    return "<s>" + "".join(f"<|user|>{text}<|end|>\n" for text in texts) + " <|user|>"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", MORE)
@settings(max_examples=30)
@given(texts=st.lists(TEXTS, min_size=1, max_size=2), strips=st.booleans(), normalized=st.booleans())
def test_a_chat_is_encoded_as_its_whole_text(
    kind: str, more: str, texts: list[str], strips: bool, normalized: bool
) -> None:
    made = tokenizer(kind, more, strips, normalized)

    assert chat(made, *texts) == made.backend.encode(rendered(*texts), add_special_tokens=False).ids


SAID = "hello  a <br> ab\n\nabe hello"
RECORDED = {
    ("metaspace first False", "plain"): "hello ▁ ▁a ▁ < b r > ▁a b \\n \\n a b e ▁hello <|end|> \\n ▁",
    ("metaspace first False", "strip"): "hello a <br> ▁a b \\n \\n a b e ▁ hello <|end|> \\n ▁",
    ("metaspace always False", "plain"): "▁hello ▁ ▁a ▁ < b r > ▁a b \\n \\n a b e ▁hello <|end|> ▁ \\n ▁",
    ("metaspace never False", "words"): "hello __ a ▁ < b r > ▁ ab \\n\\n a b e ▁hello <|end|> \\n ▁",
    ("unigram first", "words"): "hello __ a ▁ < b r > ▁ ab \\n\\n a b e ▁hello <|end|> \\n ▁",
    ("bytes behind a space", "strip"): "hello Ġ a <br> Ġ a b Ċ Ċ a b e Ġ hello <|end|> Ġ Ċ Ġ",
    ("prepending normalizer", "plain"): "▁hello ▁ ▁a ▁ < b r > ▁a b \\n \\n a b e ▁hello <|end|> ▁ \\n ▁",
}


@pytest.mark.parametrize(("kind", "more"), RECORDED)
def test_a_chat_has_the_tokens_that_were_recorded(kind: str, more: str) -> None:
    made = tokenizer(kind, more)
    tokens = [token.replace("\n", r"\n").replace("  ", "__") for token in spelled(made, chat(made, SAID))]

    assert tokens == ["<s>", "<|user|>", *RECORDED[kind, more].split(), "<|user|>"]


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, "<s> <|user|> hello ▁a <|end|> \\n ▁ <|user|>"),
        ({"legacy": True}, "<s> <|user|> ▁hello ▁a <|end|> ▁ \\n ▁ <|user|>"),
        ({"add_prefix_space": False}, "<s> <|user|> hello ▁a <|end|> \\n ▁ <|user|>"),
    ],
)
@pytest.mark.parametrize("kind", ["prepending normalizer", "metaspace never True"])
def test_llamas_class_says_how_spaces_are_marked(
    tmp_path: Path, kind: str, fields: dict[str, bool], tokens: str
) -> None:
    tokenizer(kind).backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", **fields}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    made = Tokenizer.from_directory(tmp_path)

    assert [token.replace("\n", r"\n") for token in spelled(made, chat(made, "hello a"))] == tokens.split()


def test_a_byte_level_vocabulary_under_llamas_class_stays_what_it_is(tmp_path: Path) -> None:
    bytes_ = tokenizer("bytes")
    bytes_.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}'
    )

    assert chat(Tokenizer.from_directory(tmp_path), SAID) == chat(bytes_, SAID)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(before=TEXTS, spelled=st.sampled_from(SPECIAL), after=TEXTS, strips=st.booleans())
def test_text_that_spells_a_control_token_does_not_make_it(
    kind: str, before: str, spelled: str, after: str, strips: bool
) -> None:
    made = tokenizer(kind, "plain", strips)
    control = set(made.control_tokens().values()) - {made.backend.token_to_id("<unk>")}

    ids = chat(made, before + spelled + after)

    assert [made.backend.id_to_token(i) for i in ids if i in control] == [
        "<s>", "<|user|>", "<|end|>", "<|user|>",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["<S>", "＜s＞", "<|USER|>"])
def test_text_that_is_folded_to_a_control_token_does_not_make_it(text: str) -> None:
    made = tokenizer("folding normalizer", "plain", False, True)

    assert len(set(chat(made, text)) & set(made.control_tokens().values())) == 3


def test_what_spells_a_control_token_is_encoded_as_ordinary_text() -> None:
    made = tokenizer("metaspace first False")

    assert spelled(made, chat(made, "a</s>hello")) == [
        "<s>", "<|user|>", "a", "</", "s", ">", "hello", "<|end|>", "\n", "▁", "<|user|>",
    ]  # fmt: skip
    assert spelled(made, chat(made, "a<s>hello<s>"))[2:-4] == ["a", "<", "s", ">", "hello", "<", "s", ">"]


def test_added_tokens_that_are_text_are_found_beside_spelled_control_tokens() -> None:
    made = tokenizer("metaspace never False", "words")

    assert spelled(made, chat(made, "</s>  ab"))[2:-4] == ["</", "s", ">", "  ", "ab"]


def test_markup_that_the_template_writes_is_control_though_no_flag_says_so() -> None:
    made = bpe(pre_tokenizers.Metaspace(prepend_scheme="never", split=False))
    made.add_tokens([AddedToken(t, normalized=False) for t in ("<|user|>", "<|end|>", "<br>", "user")])
    given_ = Tokenizer(made, bos_token_id=None, add_bos=False)

    assert set(given_.control_tokens(TEMPLATE)) == {"<|user|>", "<|end|>"}
    assert set(given_.control_tokens()) == {"<|user|>", "<|end|>", "<br>"}
    assert spelled(given_, chat(given_, "<|end|><br>user"))[-7:-4] == [">", "<br>", "user"]


def test_a_control_token_may_be_one_character() -> None:
    made = bpe(pre_tokenizers.Metaspace(prepend_scheme="never", split=False))
    made.add_special_tokens(["§", "…"])
    given_ = Tokenizer(made, bos_token_id=None, add_bos=False)
    template = "§{{ messages[0].content }}…§"

    ids = TemplateChat(given_, template).render({"messages": [{"role": "user", "content": "a§…"}]}).token_ids

    assert spelled(given_, ids) == ["§", "a", "<0xC2>", "<0xA7>", "<0xE2>", "<0x80>", "<0xA6>", "…", "§"]


def test_a_vocabulary_with_gaps_keeps_text_and_control_tokens_apart() -> None:
    made = tokenizers.Tokenizer(models.BPE({"a": 0, "<s>": 1, "b": 3, "<": 2, "s": 4, ">": 6}, []))
    made.add_special_tokens(["<s>"])
    given_ = Tokenizer(made, bos_token_id=None, add_bos=False)

    assert given_.encode_prompt("<s>ab<s>", [(0, 3)]) == [1, 0, 3, 2, 4, 6]


@given(mark=st.sampled_from(["\ue000", "\ue001", "\uf8ff"]), text=TEXTS)
def test_private_use_characters_spell_no_control_token(mark: str, text: str) -> None:
    made = tokenizer("metaspace first False")
    control = set(made.control_tokens().values())

    ids = made.encode_prompt(f"<s>{mark}<s>{mark}{text}", [(0, 3)])

    assert [i for i in ids if i in control] == [made.backend.token_to_id("<s>")]


def test_a_text_that_the_library_fails_on_is_a_bad_request() -> None:
    made = bpe(pre_tokenizers.Metaspace(prepend_scheme="never", split=False))
    made.add_tokens(
        [AddedToken("a", rstrip=True, normalized=False), AddedToken(" ", lstrip=True, normalized=False)]
    )

    with pytest.raises(RequestError, match="the model's tokenizer fails on this text"):
        Tokenizer(made, bos_token_id=None, add_bos=False).encode("a \n")


def spelled(made: Tokenizer, ids: list[int]) -> list[str]:
    return [made.backend.id_to_token(i) or "" for i in ids]


@given(tokens=st.sets(st.text("ab.(", min_size=1, max_size=4), max_size=8), text=st.text("ab.(", max_size=12))
def test_the_longest_token_at_each_place_is_found(tokens: set[str], text: str) -> None:
    longest_first = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)"

    assert re.findall(pattern_of(tokens), text) == re.findall(longest_first, text)
