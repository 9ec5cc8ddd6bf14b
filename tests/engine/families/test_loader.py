"""What ends an answer: the model's config, `generation_config.json` beside it, GGUF's metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from engine.chat.harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, TAGS
from engine.engine import Engine
from engine.families.loader import load, open_checkpoint
from engine.families.registry import family_of
from engine.output import FinishReason
from engine.sampling.params import SamplingParams
from quant.errors import ConfigError
from tests.engine.chat.answers import Answer
from tests.engine.families.tiny_llama import VOCAB, tiny_values, write_gguf, write_safetensors


def llama(
    path: Path, eos: object = 1, generation: object = None, tokenizer_config: dict[str, Any] | None = None
) -> Path:
    """A Llama whose tokens are the words `w0` to `w79`."""
    write_safetensors(path, tiny_values(), {"eos_token_id": eos})
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config or {}))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return path


@pytest.mark.parametrize(
    ("eos", "generation", "ends"),
    [
        (1, 5, (1, 5)),
        (1, [5, 1, 6], (1, 5, 6)),
        ([1, 2], [], (1, 2)),
        (None, 5, (5,)),
        (None, [5, 6], (5, 6)),
        (1, None, (1,)),
    ],
)
def test_the_ends_of_both_configs_count(
    tmp_path: Path, eos: object, generation: object, ends: tuple[int, ...]
) -> None:
    assert load(llama(tmp_path / "m", eos, generation)).model.info.eos_token_ids == ends


def test_where_no_config_names_an_end_the_tokenizers_counts(tmp_path: Path) -> None:
    loaded = load(llama(tmp_path / "m", eos=None, tokenizer_config={"eos_token": "w7"}))

    assert loaded.model.info.eos_token_ids == (7,)


@pytest.mark.parametrize("eos", [None, 77, [77, 79, 78], [76, 77]])
def test_gpt_oss_ends_with_its_own_tokens_whatever_its_files_name(tmp_path: Path, eos: object) -> None:
    # `<|end|>` (76) ends a message, of which an answer has several; some files name it as an end.
    path = llama(tmp_path / "m", eos)
    names = {
        "w73": START,
        "w74": CHANNEL,
        "w75": MESSAGE,
        "w76": END,
        "w77": RETURN,
        "w78": CALL,
        "w72": CONSTRAIN,
    }
    backend = tokenizers.Tokenizer(
        models.WordLevel({names.get(f"w{i}", f"w{i}"): i for i in range(VOCAB)}, unk_token="w0")
    )
    backend.add_special_tokens([*TAGS])
    backend.save(str(path / "tokenizer.json"))

    ends = load(path).model.info.eos_token_ids
    assert {77, 78} <= set(ends) <= {77, 78, 79}


def test_v41_reads_the_generation_config_too(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "generation_config.json").write_text('{"eos_token_id": [1, 300]}')

    assert load(checkpoint_copy).model.info.eos_token_ids == (1, 300)


def test_an_answer_stops_at_an_end_that_only_the_generation_config_names(tmp_path: Path) -> None:
    loaded = load(llama(tmp_path / "m", 1, [1, 9]))
    engine = Engine(loaded.model, loaded.tokenizer, max_sequences=1, max_context=32)
    engine.start()
    answer = Answer()

    engine.submit([3, 4], SamplingParams(temperature=0, logit_bias={9: 100.0}, max_tokens=8), answer)
    answer.wait()
    engine.stop()

    assert (answer.token_ids, answer.finish_reason) == ([9], FinishReason.STOP)


@pytest.mark.parametrize("wrong", ["5", True, 5.0, -1, VOCAB, [1, "5"], [[5]], {"id": 5}])
def test_ends_that_are_no_token_ids_are_refused_by_the_files_name(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is .* 0 to 79"):
        load(llama(tmp_path / "m", 1, wrong))


def test_an_end_of_the_config_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"end-of-sequence ids \[80\] are not in the vocabulary, 0 to 79"):
        load(llama(tmp_path / "m", [1, VOCAB]))


def test_gguf_names_ends_of_sequence_turn_and_message(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", tiny_values(), metadata={"tokenizer.ggml.eom_token_id": 3})

    checkpoint = open_checkpoint(file)
    assert family_of(checkpoint).describe(checkpoint)[0].eos_token_ids == (1, 2, 3)
