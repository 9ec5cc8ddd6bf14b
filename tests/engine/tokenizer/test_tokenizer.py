"""Tokenizers from directories and from GGUF metadata, and what never becomes a special token."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from engine.tokenizer.tokenizer import Tokenizer
from memory.checkpoint.checkpoint import Checkpoint
from quant.errors import CheckpointError, ConfigError, RequestError
from tests.conftest import golden_path

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello")]
VOCAB = [*ALPHABET, *("".join(pair) for pair in MERGES)]
BOS, EOS, THINK = len(VOCAB), len(VOCAB) + 1, len(VOCAB) + 2


def backend() -> tokenizers.Tokenizer:
    """Bytes, five merges, two special tokens, and `<think>`, which is an added token but not special."""
    made = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(VOCAB)}, merges=MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens([AddedToken("<think>", normalized=False)])
    return made


def write(
    path: Path, config: Mapping[str, Any] | None = None, made: tokenizers.Tokenizer | None = None
) -> Path:
    (path / "tokenizer.json").write_text((made or backend()).to_str(), encoding="utf-8")
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(backend(), bos_token_id=BOS, add_bos=True)


def test_spelling_a_special_token_makes_it_only_when_parsed(tokenizer: Tokenizer) -> None:
    text = "hello<s> hello<think>"

    parsed, literal = tokenizer.encode(text), tokenizer.encode(text, parse_special=False)

    assert {BOS, THINK} <= set(parsed)
    assert not {BOS, EOS, THINK} & set(literal)
    assert tokenizer.decode(parsed) == tokenizer.decode(literal) == text


@given(text=st.text(), spelled=st.sampled_from(["<s>", "</s>", "<think>"]), tail=st.text())
def test_no_text_taken_literally_holds_a_special_token(text: str, spelled: str, tail: str) -> None:
    tokenizer = Tokenizer(backend(), bos_token_id=BOS, add_bos=True)

    ids = tokenizer.encode(text + spelled + tail, parse_special=False)

    assert max(ids) < BOS
    assert tokenizer.decode(ids) == text + spelled + tail


@given(text=st.text())
def test_bytes_of_tokens_put_together_are_the_text(text: str) -> None:
    tokenizer = Tokenizer(backend(), bos_token_id=BOS, add_bos=True)

    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_a_prompt_says_by_place_what_is_special(tokenizer: Tokenizer) -> None:
    text = "<s>hello<s>"

    assert tokenizer.encode_prompt(text, [(0, 3)]) == [
        BOS,
        *tokenizer.encode("hello<s>", parse_special=False),
    ]
    assert tokenizer.encode_prompt(text, [(0, 3), (8, 11)]) == [BOS, *tokenizer.encode("hello"), BOS]
    assert tokenizer.encode_prompt(text, []) == tokenizer.encode(text, parse_special=False)


def test_a_special_token_that_the_vocabulary_lacks_stays_text(tokenizer: Tokenizer) -> None:
    text = "<s>hello<|user|>hello"

    ids = tokenizer.encode_prompt(text, [(0, 3), (8, 16)])

    assert ids == [BOS, *tokenizer.encode("hello<|user|>hello")]


def test_the_beginning_token_is_added_only_on_request_and_where_the_model_wants_it(
    tokenizer: Tokenizer,
) -> None:
    without = Tokenizer(backend(), bos_token_id=BOS, add_bos=False)

    assert tokenizer.encode("hello") == without.encode("hello", add_special_tokens=True)
    assert tokenizer.encode("hello", add_special_tokens=True) == [BOS, *tokenizer.encode("hello")]


def test_a_text_that_spells_its_beginning_gets_no_second_one(tokenizer: Tokenizer) -> None:
    hello = tokenizer.encode("hello")

    assert tokenizer.encode("<s>hello", add_special_tokens=True) == [BOS, *hello]
    assert tokenizer.encode("hello<s>", add_special_tokens=True) == [BOS, *hello, BOS]
    assert tokenizer.front_of(hello) == [BOS]
    assert tokenizer.front_of([BOS, *hello]) == []


def test_a_text_begins_with_all_that_the_post_processor_puts_there() -> None:
    made = backend()
    made.post_processor = processors.TemplateProcessing(
        "<think> <s> $A </s>", None, [("<s>", BOS), ("</s>", EOS), ("<think>", THINK)]
    )
    tokenizer = Tokenizer(made, bos_token_id=BOS, add_bos=True)
    hello = tokenizer.encode("hello")

    assert tokenizer.encode("hello", add_special_tokens=True) == [THINK, BOS, *hello]
    assert tokenizer.encode("<think><s>hello", add_special_tokens=True) == [THINK, BOS, *hello]


def test_decoding_can_leave_special_tokens_out(tokenizer: Tokenizer) -> None:
    ids = [BOS, *tokenizer.encode("hello"), EOS]

    assert tokenizer.decode(ids) == "<s>hello</s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"


def test_text_that_is_not_unicode_is_a_bad_request(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")


def test_other_threads_go_on_while_a_long_text_is_encoded() -> None:
    tokenizer = Tokenizer.from_directory(golden_path("v41-c"))
    turns, is_over = [0], threading.Event()

    def take_turns() -> None:
        while not is_over.wait(0.001):
            turns[0] += 1

    other = threading.Thread(target=take_turns)
    other.start()
    try:
        before = turns[0]
        tokenizer.encode("words of a long text " * 60_000)
        during = turns[0] - before
    finally:
        is_over.set()
        other.join()

    assert during > 10  # two or three where it must wait for the end


def test_size_is_one_more_than_the_largest_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.size == THINK + 1
    assert tokenizer.token_bytes(tokenizer.size) == b""


def test_sentencepiece_style_tokens_have_their_bytes_too() -> None:
    vocab = {"<unk>": 0, "▁hello": 1, "<0xC3>": 2, "<0xA9>": 3}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(made, bos_token_id=None, add_bos=False)

    assert b"".join(map(tokenizer.token_bytes, [1, 2, 3])) == " helloé".encode()


def test_the_golden_tokenizer_loads_without_a_tokenizer_config() -> None:
    tokenizer = Tokenizer.from_directory(golden_path("v41-a"))

    assert (tokenizer.size, tokenizer.bos_token_id, tokenizer.add_bos, tokenizer.chat_template) == (
        1024, None, False, None,
    )  # fmt: skip
    assert tokenizer.encode("<｜User｜>") == [3]


def test_a_directory_gives_template_and_named_tokens(tmp_path: Path) -> None:
    config = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "pad_token": None,
        "add_bos_token": True,
        "chat_template": "{{ bos_token }}",
    }

    tokenizer = Tokenizer.from_directory(write(tmp_path, config))

    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.add_bos) == (BOS, EOS, True)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.chat_template == "{{ bos_token }}"


def test_of_several_templates_the_default_one_counts_and_one_for_tools(tmp_path: Path) -> None:
    names = {"tool_use": "t", "default": "d", "rag": "r"}
    templates = [{"name": name, "template": text} for name, text in names.items()]
    write(tmp_path, {"chat_template": templates})

    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("d", "t")

    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("file", "for tools")


def test_a_template_file_comes_before_the_config(tmp_path: Path) -> None:
    write(tmp_path, {"chat_template": "config"})
    (tmp_path / "chat_template.jinja").write_text("file")

    assert Tokenizer.from_directory(tmp_path).chat_template == "file"


@pytest.mark.parametrize(("config", "adds"), [({}, True), ({"add_bos_token": False}, False)])
def test_without_a_word_in_the_config_the_post_processor_tells_whether_bos_is_added(
    tmp_path: Path, config: dict[str, Any], adds: bool
) -> None:
    made = backend()
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])

    tokenizer = Tokenizer.from_directory(write(tmp_path, {"bos_token": "<s>", **config}, made))

    assert tokenizer.add_bos is adds
    assert tokenizer.encode("hello") == Tokenizer(backend(), bos_token_id=None, add_bos=False).encode("hello")


def test_truncation_and_padding_in_the_file_are_not_applied(tmp_path: Path) -> None:
    made = backend()
    made.enable_truncation(2)
    made.enable_padding(length=8)

    assert len(Tokenizer.from_directory(write(tmp_path, None, made)).encode("a b c d")) == 7


def test_a_directory_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing; copy it from"):
        Tokenizer.from_directory(tmp_path)


def test_tokens_that_only_the_config_names_are_special_too(tmp_path: Path) -> None:
    config = {"eos_token": "hello", "additional_special_tokens": ["hell", {"content": "ll"}, "absent"]}

    tokenizer = Tokenizer.from_directory(write(tmp_path, config))

    assert {"hello", "hell", "ll"} <= tokenizer.control_tokens().keys()
    assert "absent" not in tokenizer.added_tokens


def test_tokens_that_the_config_declares_are_added_as_it_says(tmp_path: Path) -> None:
    declared = {
        str(BOS): {"content": "<s>", "rstrip": True, "special": True},
        str(THINK + 1): {"content": "<more>", "normalized": False, "lstrip": True, "special": False},
    }

    tokenizer = Tokenizer.from_directory(write(tmp_path, {"added_tokens_decoder": declared}))

    assert tokenizer.encode("<s>  hello") == [BOS, *tokenizer.encode("hello")]
    assert tokenizer.encode("hello  <more>") == [*tokenizer.encode("hello"), THINK + 1]


def test_an_old_directory_names_its_tokens_in_a_file_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, {"bos_token": "</s>"})
    (tmp_path / "special_tokens_map.json").write_text(
        '{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}'
    )

    tokenizer = Tokenizer.from_directory(tmp_path)

    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)


@pytest.mark.parametrize(
    "declared", [[1], {"x": {"content": "<a>"}}, {"1": "<a>"}, {"1": {"content": "<a>", "lstrip": 1}}]
)
def test_tokens_that_are_declared_wrongly_are_refused(tmp_path: Path, declared: Any) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: added_tokens_decoder"):
        Tokenizer.from_directory(write(tmp_path, {"added_tokens_decoder": declared}))


def test_a_byte_level_token_that_is_no_bytes_is_its_own_spelling() -> None:
    vocab = {c: i for i, c in enumerate([*ALPHABET, "<｜x｜>"])}
    made = tokenizers.Tokenizer(models.BPE(vocab, []))
    made.decoder = decoders.ByteLevel()

    assert Tokenizer(made, bos_token_id=None, add_bos=False).token_bytes(len(ALPHABET)) == "<｜x｜>".encode()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": 3}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_tokenizer_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)

    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_tokenizer_config_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)

    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: (not|expected)"):
        Tokenizer.from_directory(tmp_path)


def test_a_named_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'<eot>' is not in tokenizer\.json; the files do not match"):
        Tokenizer.from_directory(write(tmp_path, {"eos_token": "<eot>"}))


def test_a_template_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has 2000000 characters, more than the limit"):
        Tokenizer.from_directory(write(tmp_path, {"chat_template": "x" * 2_000_000}))


def gguf(**changes: Any) -> Checkpoint:
    """A checkpoint with the metadata of a small `smollm` tokenizer; underscores stand for dots."""
    metadata: dict[str, Any] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": [*VOCAB, "<s>", "</s>", "<think>"],
        "token_type": [1] * len(VOCAB) + [3, 3, 4],
        "merges": [" ".join(pair) for pair in MERGES],
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "add_bos_token": True,
        **changes,
    }
    config = {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}
    config["tokenizer.chat_template"] = "{{ eos_token }}"
    return Checkpoint(Path("m.gguf"), "llama", config, {}, [])


def test_a_gguf_file_may_have_a_template_for_tools() -> None:
    checkpoint = gguf()
    assert Tokenizer.from_gguf(checkpoint).tool_template is None

    config = {**checkpoint.config, "tokenizer.chat_template.tool_use": "t"}
    checkpoint = Checkpoint(checkpoint.path, "llama", config, {}, [])
    assert Tokenizer.from_gguf(checkpoint).tool_template == "t"


def test_a_gguf_file_carries_the_same_tokenizer() -> None:
    tokenizer = Tokenizer.from_gguf(gguf())
    text = "hello hello<s>ll é 😀"

    assert tokenizer.encode(text) == Tokenizer(backend(), bos_token_id=None, add_bos=False).encode(text)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.add_bos) == (BOS, EOS, True)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.chat_template == "{{ eos_token }}"
    assert tokenizer.added_tokens == {"<s>": BOS, "</s>": EOS, "<think>": THINK}


def test_smollm_takes_every_digit_alone() -> None:
    tokens = [*VOCAB[:-1], "12", "<s>", "</s>", "<think>"]
    tokenizer = Tokenizer.from_gguf(gguf(merges=["1 2"], tokens=tokens))

    assert len(tokenizer.encode("1212")) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, r"tokenizer\.ggml\.model is 'bert'; supported: gpt2, llama"),
        ({"model": None}, r"tokenizer\.ggml\.model is None"),
        ({"pre": "bloom"}, r"tokenizer\.ggml\.pre is 'bloom'; supported: .*smollm"),
    ],
)
def test_other_kinds_of_gguf_tokenizer_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tokenizer.from_gguf(gguf(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "tokens is missing or not a list of strings"),
        ({"tokens": [1, 2]}, "tokens is missing or not a list of strings"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["x yz"]}, "merges do not fit the tokens"),
        ({"token_type": [1]}, "token_type does not have one number per token"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, r"tokens has 1 duplicate token\(s\)"),
        ({"eos_token_id": 10_000}, "the eos token id is 10000, expected 0 to"),
        ({"bos_token_id": "x"}, "the bos token id is 'x'"),
    ],
)
def test_gguf_metadata_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_gguf(gguf(**changes))


def test_how_a_long_prompt_begins_is_told_before_all_of_it_is_encoded(tokenizer: Tokenizer) -> None:
    text = "<s>" + "hello " * 20_000
    heard: list[list[int]] = []

    of_prompt = tokenizer.encode_prompt(text, [(0, 3)], on_beginning=heard.append)
    of_text = tokenizer.encode(text[3:], on_beginning=heard.append)
    tokenizer.encode("hello", on_beginning=heard.append)

    first, second = (told[:2_000] for told in heard)  # the last ones are cut
    assert (first, second) == (of_prompt[:2_000], of_text[:2_000])
    assert of_prompt == tokenizer.encode_prompt(text, [(0, 3)])
