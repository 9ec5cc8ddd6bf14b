"""Records what other programs make of many strings, for the tests of the tokenizers in GGUF files.

    pip install xllamacpp==2026.10.11549 gguf sentencepiece==0.2.3
    python -m tests.golden.tokenizers.record

It writes three files beside itself:

vocabulary.json     A byte-level vocabulary with its merges. It was trained on the texts below without a cut
                    into words, so that its tokens span whatever a cut separates: another cut gives other ids.
llama_cpp.json      For every text, what llama.cpp makes of it with each of the pre-tokenizers
                    (`tokenizer.ggml.pre`); names with the same ids are listed together.
sentencepiece.json  A SentencePiece BPE vocabulary, trained on the same texts, what SentencePiece makes of
                    them, and what llama.cpp makes of texts with control tokens in them.

released.json beside it holds parts of published tokenizer.json files (of Mistral's, the `pattern` of its
tekken.json), as they stand there: normalizer, pre_tokenizer and ignore_merges.
"""

from __future__ import annotations

import io
import json
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from engine.tokenizer.cuts import CUTS
from server.cli.bench.llama_cpp import serving_llama_cpp
from tests.engine.families.tiny_llama import HIDDEN, tiny_values, write_gguf

HERE = Path(__file__).parent
CONTROL = ["<s>", "</s>", "<|im_end|>"]

TEXTS = [
    "", " ", "  ", "   ", "\n", "\n\n\n", "\t\t", "\r\n", " \n ", "a ", " a", "  a", "a  b", "a   b", "a\nb",
    "a\n\nb", "a \n b", "a\t\tb", "x\r\ny\r\n", "  x  \n\n  y", "Hello", "Hello, world!", "HELLO WORLD",
    "Hello   world  !", "it's", "IT'S", "I'm you're we've he'll she'd don't", "I'M YOU'RE WE'VE", "'s 't 're",
    "’s it’s", "rock'n'roll", "'tis'", "can't.Won't", "1", "12", "123", "1234567890", "3.14159", "1,000,000",
    "v1.2.3-rc4", "2024-02-29T12:34:56Z", "a1b2c3", " 1 2 3", "123abc456", "٣٤٥", "²³", "½ cup", "Ⅷ", "①②③④",
    "১২৩৪", "x²+y²=z²", "é", "naïve café", "Straße", "ÅÄÖ åäö", "Ελληνικά", "Русский ТЕКСТ", "עברית",
    "العربية", "हिन्दी में", "ไทยแลนด์", "e\u0301te\u0301", "中文字符,标点。", "日本語のテキスト",
    "カタカナ漢字かな", "한국어 텍스트", "中文abc字符123", "「引用」！？", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "👍",
    "👨‍👩‍👧‍👦", "🇩🇪 a👍b", "a\u00a0b", "a\u3000b",
    "a\u2003 b", "\u200b", "\u0001\u0002", "\ufeff", "\ufffd", "camelCase", "HTTPServer", "aBcDeF", "ǅungla",
    "def f(x):\n    return x + 1\n", "for (int i = 0; i < 10; ++i) {\n\tprintf(\"%d\\n\", i);\n}",
    "SELECT * FROM t WHERE a >= 3 AND b != 'x';", "<html><body>&nbsp;</body></html>", "a/b//c\n/\n/d",
    "{\"a\": [1, 2, {\"b\": null}]}", "https://example.org/a?b=c&d=%20#e", "a_b-c.d/e\\f", "!!!", "...\n\n",
    "…",
    "(((", "])}\n", "$100 €20 £3", "@#%^&*", "=====", "# Title\n\n* item\n* item 2\n", "#include <x>",
    "a" * 20,
    " " * 20, "\n" * 9, "0" * 10, "“quoted” ‘text’", "don''t", "a'sb", "'S", "Wait—what?!", "trailing   ",
]  # fmt: skip


MARKED = [
    "<s>",
    "<s>Hello",
    "<s> Hello",
    "<s>Hello</s>x",
    "a <s> b",
    "<s></s>",
    "Hello<|im_end|>\nHello",
    "<unk>a",
]


def train() -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=1000, min_frequency=1, special_tokens=CONTROL, initial_alphabet=alphabet,
            show_progress=False,
        ),
    )  # fmt: skip
    vocab = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {"tokens": sorted(vocab, key=lambda token: vocab[token]), "merges": [" ".join(m) for m in merges]}


def metadata(vocabulary: dict[str, Any], pre: str) -> dict[str, Any]:
    tokens = vocabulary["tokens"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in CONTROL else 1 for token in tokens],
        "tokenizer.ggml.merges": vocabulary["merges"],
    }


def train_sentencepiece() -> dict[str, Any]:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.split("\n")), model_writer=written,
        vocab_size=700, model_type="bpe", byte_fallback=True, character_coverage=0.98, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        control_symbols="<|im_end|>", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    made = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    ids = range(made.vocab_size())
    types = [
        2 if made.is_unknown(i) else 3 if made.is_control(i) else 6 if made.is_byte(i) else 1 for i in ids
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [made.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [made.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "ids": {text: made.encode(text) for text in TEXTS},
    }


def by_llama_cpp(folder: Path, metadata: dict[str, Any], texts: list[str]) -> list[list[int]]:
    """Control tokens in `texts` are parsed."""
    size = len(metadata["tokenizer.ggml.tokens"])
    values = tiny_values()
    embeddings = np.random.default_rng(0).normal(size=(size, HIDDEN))
    values["token_embd.weight"] = embeddings.astype(np.float32)
    file = write_gguf(folder / "tiny.gguf", values, metadata=metadata | {"llama.vocab_size": size})
    with serving_llama_cpp(file, threads=1, streams=1, context=64) as url:
        return [tokenize(url, text) for text in texts]


def tokenize(url: str, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    request = urllib.request.Request(f"{url}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        tokens: list[int] = json.load(reply)["tokens"]
        return tokens


def main() -> None:
    vocabulary, pieces = train(), train_sentencepiece()
    (HERE / "vocabulary.json").write_text(json.dumps(vocabulary) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        recorded = {pre: by_llama_cpp(Path(folder), metadata(vocabulary, pre), TEXTS) for pre in sorted(CUTS)}
        file = {key: value for key, value in pieces.items() if key != "ids"}
        marked = by_llama_cpp(Path(folder), file, [*MARKED, *TEXTS])
    pieces["marked_ids"] = dict(zip(MARKED, marked, strict=False))
    pieces["llama_cpp_differs"] = [
        text for text, ids in zip(TEXTS, marked[len(MARKED) :], strict=True) if pieces["ids"][text] != ids
    ]
    (HERE / "sentencepiece.json").write_text(json.dumps(pieces) + "\n")
    rows = []
    for n, text in enumerate(TEXTS):
        by_ids: dict[str, list[str]] = {}
        for pre, ids in recorded.items():
            by_ids.setdefault(" ".join(map(str, ids[n])), []).append(pre)
        rows.append({"text": text, "ids": {" ".join(pres): ids for ids, pres in by_ids.items()}})
    lines = ",\n".join(json.dumps(row) for row in rows)
    (HERE / "llama_cpp.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
