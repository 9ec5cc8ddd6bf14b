"""Tokenizers in GGUF files against published ones, llama.cpp, SentencePiece and transformers.

What the other programs made of the texts is recorded in tests/golden/tokenizers; record.py there says how.
"""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from engine.tokenizer.cuts import CASED, CUTS
from engine.tokenizer.gguf import merges_by_score
from engine.tokenizer.tokenizer import Tokenizer
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.gguf_files import open_gguf
from quant.errors import CheckpointError, ConfigError
from tests.engine.families.tiny_llama import tiny_values, write_gguf

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizers"
VOCABULARY = json.loads((GOLDEN / "vocabulary.json").read_text())
RELEASED = json.loads((GOLDEN / "released.json").read_text())
ROWS = json.loads((GOLDEN / "llama_cpp.json").read_text())
PIECES = json.loads((GOLDEN / "sentencepiece.json").read_text())
TEXTS = [row["text"] for row in ROWS]
IM_END = 2

MARKS = {"हिन्दी में", "ไทยแลนด์", "e\u0301te\u0301"}
NOT_NFC = {"e\u0301te\u0301"}
NUMBERS = {
    "12", "123", "1234567890", "3.14159", "1,000,000", "2024-02-29T12:34:56Z", "123abc456", "٣٤٥", "²³",
    "①②③④", "১২৩৪", "中文abc字符123", "https://example.org/a?b=c&d=%20#e", "$100 €20 £3", "0000000000",
}  # fmt: skip
# Where llama.cpp departs from what the models publish: it takes marks for no part of a cased word, normalises
# nothing, joins digits that DeepSeek's first tokenizers take one by one, and cuts no camel case for Kimi.
LLAMA_CPP_DEPARTS = {
    "deepseek-coder": {"a\u3000b"},
    "deepseek-llm": {"a\u3000b"} | NUMBERS,
    "gpt-4o": MARKS,
    "kimi-k2": MARKS | {"camelCase", "aBcDeF"},
    "llama4": MARKS,
    "minimax-m2": MARKS,
    "olmo": NOT_NFC,
    "qwen2": NOT_NFC,
    "qwen35": NOT_NFC,
    "tekken": MARKS,
}
TRANSFORMERS = {
    "gpt-2": ("gpt2.tokenization_gpt2", "GPT2Tokenizer"),
    "olmo": ("gpt_neox.tokenization_gpt_neox", "GPTNeoXTokenizer"),
    "qwen2": ("qwen2.tokenization_qwen2", "Qwen2Tokenizer"),
    "qwen35": ("qwen3_5.tokenization_qwen3_5", "Qwen3_5Tokenizer"),
}


def metadata(pre: Any, **changes: Any) -> dict[str, Any]:
    """The recorded vocabulary, of which the first three tokens are control tokens."""
    tokens = VOCABULARY["tokens"]
    keys: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "merges": VOCABULARY["merges"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def pieces(**changes: Any) -> dict[str, Any]:
    """SentencePiece's recorded vocabulary."""
    found = {key: value for key, value in PIECES.items() if key.startswith("tokenizer.ggml.")}
    return found | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def read(config: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(Checkpoint(Path("m.gguf"), "llama", config, {}, []))


@cache
def of(pre: str) -> Tokenizer:
    return read(metadata(pre))


@cache
def released(pre: str) -> Backend:
    """The recorded vocabulary in a tokenizer that is otherwise as a model's publisher wrote it."""
    vocab = {token: i for i, token in enumerate(VOCABULARY["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in VOCABULARY["merges"]]
    made = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=RELEASED[pre]["ignore_merges"]))
    made.decoder = decoders.ByteLevel()
    parts = json.loads(made.to_str())
    parts |= {name: RELEASED[pre][name] for name in ("normalizer", "pre_tokenizer")}
    return Backend.from_str(json.dumps(parts))


@pytest.mark.parametrize("pre", RELEASED)
def test_ids_are_those_of_the_published_tokenizer(pre: str) -> None:
    for text in TEXTS:
        expected = released(pre).encode(text, add_special_tokens=False).ids
        assert of(pre).encode(text, parse_special=False) == expected, text


@pytest.mark.parametrize("pre", RELEASED)
@given(text=st.text(st.sampled_from("aZé\u0301ǅ 1२\n\r\t'sS/.!_<漢かﾀ한😀\u3000\u200d")))
def test_any_text_gives_the_ids_of_the_published_tokenizer(pre: str, text: str) -> None:
    expected = released(pre).encode(text, add_special_tokens=False).ids
    assert of(pre).encode(text, parse_special=False) == expected


@pytest.mark.parametrize("pre", CUTS)
def test_ids_are_llama_cpps_where_it_follows_the_models(pre: str) -> None:
    departs = set()
    for row in ROWS:
        ids = next(ids for names, ids in row["ids"].items() if pre in names.split())
        if of(pre).encode(row["text"], parse_special=False) != [int(i) for i in ids.split()]:
            departs.add(row["text"])

    assert departs == LLAMA_CPP_DEPARTS.get(pre, set())


def test_deepseeks_list_of_letters_has_all_with_a_case_but_small_armenian_and_mathematical_ones() -> None:
    listed = set()
    for part in CASED.split():
        first, _, last = part.partition("-")
        listed |= set(range(int(first, 16), int(last or first, 16) + 1))
    is_cased = {"Lu", "Ll", "Lt"}
    # Unicode 3.2 is in every Python; what became a letter later is not judged.
    missing = {c for c in range(0x1D400) if unicodedata.ucd_3_2_0.category(chr(c)) in is_cased} - listed

    assert all(unicodedata.category(chr(c)) in is_cased for c in listed)
    assert missing == {0xAA, 0xBA, 0x294, 0x2071, 0x207F, *range(0x561, 0x588)}
    assert len(listed) == 2729


@pytest.mark.slow
@pytest.mark.parametrize("pre", TRANSFORMERS)
def test_ids_are_those_of_transformers(pre: str) -> None:
    pytest.importorskip("transformers")
    module, name = TRANSFORMERS[pre]
    made: Any = getattr(import_module(f"transformers.models.{module}"), name)
    vocab = {token: i for i, token in enumerate(VOCABULARY["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in VOCABULARY["merges"]]
    reference: tokenizers.Tokenizer = made(vocab=vocab, merges=merges, unk_token="<s>").backend_tokenizer

    for text in TEXTS:
        expected = reference.encode(text, add_special_tokens=False).ids
        assert of(pre).encode(text, parse_special=False) == expected, text


@pytest.mark.parametrize("pre", CUTS)
@given(text=st.text())
def test_text_comes_back_from_its_ids(pre: str, text: str) -> None:
    tokenizer = of(pre)
    ids = tokenizer.encode(text, parse_special=False)
    normalizer = tokenizer.backend.normalizer
    expected = text if normalizer is None else normalizer.normalize_str(text)

    assert tokenizer.decode(ids) == expected
    assert b"".join(map(tokenizer.token_bytes, ids)) == expected.encode()
    assert not {0, 1, IM_END} & set(ids)


@pytest.mark.parametrize("pre", CUTS)
def test_control_tokens_stand_only_where_they_are_meant(pre: str) -> None:
    tokenizer, text = of(pre), "Hello<|im_end|>\n<|im_end|>"

    assert tokenizer.encode(text).count(IM_END) == 2
    assert tokenizer.encode(text, parse_special=False).count(IM_END) == 0
    assert tokenizer.encode_prompt(text, [(16, 26)]).count(IM_END) == 1
    assert tokenizer.decode(tokenizer.encode_prompt(text, [(16, 26)])) == text


def test_only_where_the_model_says_so_is_a_whole_word_one_token_without_merges() -> None:
    merges = [merge for merge in VOCABULARY["merges"] if merge.replace(" ", "") != "Hello"]
    assert "Hello" in VOCABULARY["tokens"]

    assert len(read(metadata("llama-bpe", merges=merges)).encode("Hello")) == 1
    assert len(read(metadata("glm4", merges=merges)).encode("Hello")) == 1
    assert len(read(metadata("qwen2", merges=merges)).encode("Hello")) > 1


@pytest.mark.parametrize(
    ("config", "adds"),
    [
        (metadata("llama-bpe"), True),
        (metadata("tekken"), True),
        (metadata("qwen2"), False),
        (metadata("llama-bpe", add_bos_token=False), False),
        (metadata("qwen2", add_bos_token=True), True),
        (pieces(), True),
        (pieces(add_bos_token=False), False),
    ],
)
def test_where_a_file_does_not_say_whether_bos_is_added_its_kind_does(
    config: dict[str, Any], adds: bool
) -> None:
    tokenizer = read(config)
    text = tokenizer.encode("Hello")

    assert tokenizer.add_bos is adds
    assert tokenizer.encode("Hello", add_special_tokens=True) == [tokenizer.bos_token_id] * adds + text


@pytest.mark.parametrize("config", [metadata("deepseek-v3"), pieces()], ids=["gpt2", "llama"])
def test_a_tokenizer_is_read_from_a_file(tmp_path: Path, config: dict[str, Any]) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_values(), metadata=config)

    tokenizer = Tokenizer.from_gguf(open_gguf(file))

    for text in TEXTS:
        assert tokenizer.encode(text) == read(config).encode(text)


@pytest.mark.parametrize("pre", ["default", "bloom", "LLAMA-BPE", "", None, 3])
def test_a_cut_that_is_not_known_is_named_and_refused(pre: Any) -> None:
    message = rf"^m\.gguf: tokenizer\.ggml\.pre is {pre!r}; supported: chatglm-bpe, dbrx, .*, tekken$"

    with pytest.raises(ConfigError, match=message):
        read(metadata(pre))


@pytest.mark.parametrize("text", PIECES["ids"])
def test_ids_are_sentencepieces(text: str) -> None:
    assert read_pieces().encode(text) == PIECES["ids"][text]


@pytest.mark.parametrize("text", PIECES["marked_ids"])
def test_text_after_a_control_token_begins_with_a_space_as_in_llama_cpp(text: str) -> None:
    assert read_pieces().encode(text) == PIECES["marked_ids"][text]


@cache
def read_pieces() -> Tokenizer:
    return read(pieces())


@given(text=st.text().filter(lambda text: "\u2581" not in text))
def test_text_comes_back_from_sentencepieces_ids(text: str) -> None:
    tokenizer = read_pieces()
    ids = tokenizer.encode(text, parse_special=False)

    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == (b" " + text.encode() if text else b"")
    assert not {0, 1, 2, 3} & set(ids)


@pytest.mark.parametrize("spelled", ["<s>", "<unk>", "<|im_end|>", "<0x41>"])
def test_text_that_spells_a_token_of_sentencepieces_makes_none(spelled: str) -> None:
    tokenizer = read_pieces()
    token = tokenizer.backend.token_to_id(spelled)

    assert token not in tokenizer.encode(f"a {spelled} b", parse_special=False)
    assert token not in tokenizer.encode_prompt(f"<s>a {spelled} b", [(0, 3)])[1:]


def test_no_space_is_put_in_front_where_the_file_says_so() -> None:
    tokenizer = read(pieces(add_space_prefix=False))

    assert tokenizer.token_bytes(tokenizer.encode("Hello")[0])[:1] == b"H"
    assert tokenizer.encode(" Hello") == PIECES["ids"]["Hello"]
    assert tokenizer.decode(tokenizer.encode(" Hello")) == " Hello"


def test_text_inside_another_gets_no_space_in_front() -> None:
    assert b"".join(map(read_pieces().token_bytes, read_pieces().encode_inside("Hello"))) == b"Hello"


def test_user_defined_tokens_are_found_in_text_as_they_are() -> None:
    tokens, types = [*PIECES["tokenizer.ggml.tokens"]], [*PIECES["tokenizer.ggml.token_type"]]
    scores = [*PIECES["tokenizer.ggml.scores"], 0.0]
    tokenizer = read(pieces(tokens=[*tokens, "[INST]"], token_type=[*types, 4], scores=scores))

    assert tokenizer.encode("[INST]Hello") == [len(tokens), *PIECES["ids"]["Hello"]]
    assert tokenizer.added_tokens["[INST]"] == len(tokens)
    assert len(tokens) not in tokenizer.special_ids


def test_characters_without_token_and_bytes_are_one_unknown_token() -> None:
    types = [5 if type_ == 6 else type_ for type_ in PIECES["tokenizer.ggml.token_type"]]
    tokens = [
        f"unused{i}" if t.startswith("<0x") else t for i, t in enumerate(PIECES["tokenizer.ggml.tokens"])
    ]
    tokenizer = read(pieces(tokens=tokens, token_type=types))

    assert tokenizer.encode("Hello\u4eba\u5c71Hello").count(0) == 1


def test_better_scores_merge_first_and_only_ordinary_tokens_merge() -> None:
    scores = {"a": -9.0, "b": -9.0, "ab": -1.0, "abb": -2.0, "bb": -0.5, "ac": 0.0}
    vocab = {token: i for i, token in enumerate([*scores, "c"])}

    assert merges_by_score(scores, vocab) == [("b", "b"), ("a", "b"), ("ab", "b"), ("a", "bb")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "scores does not have one number per token"),
        ({"scores": [0.0]}, "scores does not have one number per token"),
        (
            {"scores": ["x"] * len(PIECES["tokenizer.ggml.tokens"])},
            "scores does not have one number per token",
        ),
        ({"token_type": [1]}, "token_type does not have one number per token"),
        ({"tokens": 3}, "tokens is missing or not a list of strings"),
    ],
)
def test_sentencepiece_metadata_that_contradicts_itself_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(pieces(**changes))
