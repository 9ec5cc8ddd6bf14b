"""States on disk survive a restart, are never misread, and keep to their budget."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open

from engine.cache import restoring, stored_states
from engine.cache.identity import identity_of
from engine.cache.prefix import PrefixCache
from engine.cache.state_files import ENDING, State, StateHeader, read_header, write_state
from engine.cache.state_folders import remove_states, states_in
from engine.cache.state_layout import Target, copied, target_in
from engine.cache.stored_states import StatesOnDisk, StoredStates
from engine.engine import Engine
from engine.families.base import Batch, KvCache, Model
from engine.families.loader import load as load_all
from engine.families.registry import family_of
from engine.sampling.params import SamplingParams
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from quant.errors import ConfigError
from quant.formats.kv_names import KvFormat
from quant.kernels.choice import choose
from tests.conftest import golden_path
from tests.engine.chat.answers import Answer
from tests.engine.families.golden_families import family_path

CAPACITY = 300
PLENTY = 1 << 30


class Bench(NamedTuple):
    model: Model
    folder: Path

    def cache(self) -> KvCache:
        return self.model.new_cache(1, CAPACITY)

    def stored(
        self, cache: KvCache, budget: int = PLENTY, identity: str = "this", pending: int = PLENTY
    ) -> StoredStates:
        return StoredStates(cache, StatesOnDisk(self.folder, budget, identity, "tiny"), pending)

    def files(self) -> list[Path]:
        """The shortest text's first."""
        return sorted(self.folder.glob(f"*/*{ENDING}"), key=lambda path: len(read_header(path).tokens))


def load(path: Path) -> Model:
    checkpoint = open_safetensors(path)
    return family_of(checkpoint).load(checkpoint, choose(), MemoryBudget(1 << 30))


@pytest.fixture(scope="module")
def v41() -> Iterator[Model]:
    model = load(golden_path("v41-a"))
    yield model
    model.close()


@pytest.fixture
def bench(v41: Model, tmp_path: Path) -> Bench:
    return Bench(v41, tmp_path / "states")


def some_ids(seed: int, count: int) -> list[int]:
    return torch.randint(2, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def compute(model: Model, cache: KvCache, ids: list[int]) -> torch.Tensor:
    """All logits of a slot's next tokens."""
    return model.forward(Batch.of([(0, cache.length(0), ids)], all_logits=True), cache)


def write(bench: Bench, *texts: list[int], budget: int = PLENTY, salt: str = "") -> None:
    """What a server does that computes these texts and ends."""
    cache = bench.cache()
    stored = bench.stored(cache, budget)
    prefixes = PrefixCache(cache, PLENTY, stored)
    for ids in texts:
        cache.reset(0)
        prefix = prefixes.restore(0, ids, salt)
        logits = compute(bench.model, cache, ids[prefix.length :])
        prefixes.save(0, ids, salt, logits[-1])
    stored.close()


def found(bench: Bench, prompt: list[int], salt: str = "", identity: str = "this") -> int:
    """How many tokens of a prompt a server finds that starts now."""
    cache = bench.cache()
    stored = bench.stored(cache, identity=identity)
    cache.reset(0)
    length = PrefixCache(cache, PLENTY, stored).restore(0, prompt, salt).length
    stored.close()
    assert cache.length(0) == length
    return length


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def out_of_memory(*_: object) -> None:
    raise MemoryError


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v41-a", "deepseek_v4", "qwen3_next", "deepseek_v32"])
def test_after_a_restart_the_same_bits_follow_wherever_a_conversation_had_paused(
    name: str, tmp_path: Path
) -> None:
    model = load(golden_path(name) if name == "v41-a" else family_path(name))
    bench = Bench(model, tmp_path)
    ids = some_ids(1, 290)
    cuts = [0, 40, 64, 130, 131, 256, 289]
    cache = bench.cache()
    stored, cache_2 = bench.stored(cache), bench.cache()
    logits = []
    for start, stop in pairwise(cuts):
        logits.append(compute(model, cache, ids[start:stop]))
        PrefixCache(cache, PLENTY, stored).save(0, ids[:stop])
    stored.close()
    again = bench.stored(cache_2)
    for start, stop in pairwise(cuts):
        cache_2.reset(0)
        length = PrefixCache(cache_2, PLENTY, again).restore(0, ids[: start + 1]).length
        assert length == start
        rest = compute(model, cache_2, ids[start:stop])
        assert torch.equal(rest, logits[cuts.index(start)])
    again.close()
    model.close()


@pytest.mark.parametrize(
    ("name", "form"), [("v41-a", "vendor"), ("v41-a", "fp8"), ("mixtral", "int8"), ("gpt_oss", "bf16")]
)
def test_a_cache_of_any_format_goes_on_after_a_restart_with_the_same_bits(
    name: str, form: KvFormat, tmp_path: Path
) -> None:
    checkpoint = open_safetensors(golden_path(name) if name == "v41-a" else family_path(name))
    model = family_of(checkpoint).load(checkpoint, choose(), MemoryBudget(1 << 30, kv_format=form))
    bench = Bench(model, tmp_path)
    ids = some_ids(33, 200)
    write(bench, ids[:90], ids[:170])
    cache = bench.cache()
    stored = bench.stored(cache)
    assert PrefixCache(cache, PLENTY, stored).restore(0, ids).length == 170
    expected = compute(model, bench.cache(), ids)[170:]
    assert torch.equal(compute(model, cache, ids[170:]), expected)
    stored.close()
    model.close()


def test_a_prompt_that_was_answered_needs_no_computing_after_a_restart(bench: Bench) -> None:
    ids = some_ids(2, 100)
    write(bench, ids)
    cache = bench.cache()
    stored = bench.stored(cache)
    prefix = PrefixCache(cache, PLENTY, stored).restore(0, ids)
    expected = compute(bench.model, bench.cache(), ids)[-1]
    assert prefix.length == 100
    assert prefix.logits is not None
    assert torch.equal(prefix.logits, expected)
    stored.close()


@pytest.mark.parametrize("name", ["v41-a", "qwen3_moe", "gpt_oss"])
def test_a_server_for_longer_texts_finds_what_another_has_saved(name: str, tmp_path: Path) -> None:
    model = load(golden_path(name) if name == "v41-a" else family_path(name))
    ids = some_ids(19, 150)
    write(Bench(model, tmp_path), ids[:90], ids)
    cache = model.new_cache(1, 2 * CAPACITY)
    stored = StoredStates(cache, StatesOnDisk(tmp_path, PLENTY, "this", "tiny"), PLENTY)
    cache.reset(0)
    assert PrefixCache(cache, PLENTY, stored).restore(0, [*ids, 7]).length == 150
    stored.close()
    model.close()


def test_the_end_of_a_text_can_be_taken_back_as_far_as_in_memory(bench: Bench) -> None:
    ids = some_ids(3, 120)
    write(bench, ids)
    assert found(bench, [*ids[:110], 7, 8, 9]) == 110
    assert found(bench, [*ids[:70], 7, 8, 9]) == 0


def test_a_text_s_end_can_be_taken_back_to_before_its_own_rows(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bench.model
    ids = some_ids(53, 250)
    prompt = [*ids[:122], 7, 8, 9]
    write(bench, ids)
    counts: list[int] = []

    def counted(view: torch.Tensor, rows: int, wanted: int) -> tuple[Target, torch.Tensor | None]:
        counts.append(wanted)
        return target_in(view, rows, wanted)

    cache = bench.cache()
    stored = bench.stored(cache)
    prefixes = PrefixCache(cache, 0, stored)
    compute(model, cache, ids[:133])
    prefixes.save(0, ids[:133])
    cache.reset(0)
    wait_until(lambda: stored.stats.written == 1)
    monkeypatch.setattr(restoring, "target_in", counted)
    assert prefixes.restore(0, prompt).length == 122
    assert min(counts) >= 0
    assert torch.equal(compute(model, cache, prompt[122:]), compute(model, bench.cache(), prompt)[122:])
    stored.close()


def test_a_model_that_keeps_every_position_goes_on_from_any(tmp_path: Path) -> None:
    model = load(family_path("qwen3_moe"))
    bench = Bench(model, tmp_path)
    ids = some_ids(21, 290)
    write(bench, ids[:100], ids[:200], ids)
    assert len(bench.files()) == 3
    for length in (1, 33, 63, 64, 99, 100, 127, 128, 129, 199, 200, 250, 289):
        expected = length if length >= 32 else 0  # less is not worth it
        assert found(bench, [*ids[:length], 1]) == expected
    model.close()


def test_a_turn_writes_its_own_rows_only(bench: Bench) -> None:
    turn = some_ids(4, 280)
    write(bench, turn[:140], turn)
    first, second = bench.files()
    alone = bench._replace(folder=bench.folder / "alone")
    write(alone, turn)
    assert second.stat().st_size < alone.files()[0].stat().st_size
    assert found(bench, [*turn, 1]) == 280
    first.unlink()
    assert found(bench, [*turn, 1]) == 0  # its first rows are gone
    assert not second.exists()


def test_others_cannot_find_or_read_a_state(bench: Bench) -> None:
    ids = some_ids(5, 100)
    write(bench, ids, salt="mine")
    assert found(bench, ids, salt="mine") == 100
    assert found(bench, ids, salt="yours") == 0
    assert found(bench, ids, salt="mine", identity="another model") == 0
    (state,) = bench.files()
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign", "empty"])
def test_a_damaged_file_is_ignored_with_a_line_and_removed(
    bench: Bench, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    ids = some_ids(6, 100)
    write(bench, ids)
    (state,) = bench.files()
    content = bytearray(state.read_bytes())
    content[-100] ^= 1
    state.write_bytes(
        {
            "cut": bytes(content[: len(content) // 2]),
            "changed": bytes(content),
            "foreign": b"text",
            "empty": b"",
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert found(bench, ids) == 0
    assert len([line for line in caplog.messages if "a saved state is ignored" in line]) == 1
    assert not state.exists()


def test_where_a_file_turns_out_to_be_damaged_the_prompt_is_computed_as_if_nothing_was_saved(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    ids = some_ids(22, 280)
    write(bench, ids[:140], ids)
    first, second = bench.files()
    content = bytearray(second.read_bytes())
    with safe_open(second, framework="np") as state:
        changed = bytes(state.get_tensor("rows.1"))
    content[content.index(changed) + len(changed) // 2] ^= 1
    second.write_bytes(content)
    cache = bench.cache()
    stored = bench.stored(cache)
    prefixes = PrefixCache(cache, PLENTY, stored)
    with caplog.at_level(logging.WARNING):
        assert prefixes.restore(0, ids).length == 0
    assert "rows.1 is not what was written" in caplog.text
    assert torch.equal(compute(bench.model, cache, ids), compute(bench.model, bench.cache(), ids))
    cache.reset(0)
    assert prefixes.restore(0, ids).length == 140
    stored.close()
    assert (first.exists(), second.exists()) == (True, False)


def test_of_a_long_prompt_s_beginning_the_conversation_that_was_last_is_read_ahead(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, one, other = some_ids(26, 140), some_ids(27, 60), some_ids(28, 60)
    write(bench, begun + one, begun + other, begun + other + some_ids(29, 64))
    asked: list[Path] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda file, *_: asked.append(Path(f"/proc/self/fd/{file}").readlink())
    )
    stored = bench.stored(bench.cache())
    stored.foresee(begun[:130], "")
    assert sorted(asked) == sorted({bench.files()[i] for i in (0, 1, 2)})
    asked.clear()
    stored.foresee(begun[:130], "another's")
    stored.foresee(some_ids(30, 130), "")
    assert asked == []
    stored.close()


def test_a_short_text_that_goes_on_from_the_rows_of_a_longer_one_is_found_after_a_restart(
    bench: Bench,
) -> None:
    long = some_ids(31, 280)
    short = [*long[:140], *some_ids(32, 40)]
    write(bench, long, short)
    assert found(bench, [*short, 1]) == 180
    assert found(bench, [*long, 1]) == 280


def test_rows_of_a_text_that_goes_another_way_are_not_mixed_in(tmp_path: Path) -> None:
    model = load(family_path("qwen3_moe"))
    bench = Bench(model, tmp_path)
    begun, one, other = some_ids(23, 150), some_ids(24, 130), some_ids(25, 130)
    write(bench, begun + one, begun + other)
    cache = bench.cache()
    stored = bench.stored(cache)
    assert PrefixCache(cache, PLENTY, stored).restore(0, [*begun, *other, 1]).length == 280
    expected = compute(model, bench.cache(), [*begun, *other, 1])[-1:]
    assert torch.equal(compute(model, cache, [1]), expected)
    stored.close()
    model.close()


def test_the_least_recently_used_states_make_room(bench: Bench) -> None:
    texts = [some_ids(seed, 100) for seed in range(10, 15)]
    write(bench, texts[0])
    size = bench.files()[0].stat().st_size
    write(bench, *texts[1:3], budget=int(3.5 * size))
    assert found(bench, texts[0]) == 100  # and so used last
    write(bench, *texts[3:], budget=int(3.5 * size))
    assert sum(path.stat().st_size for path in bench.files()) <= 3.5 * size
    assert [found(bench, text) for text in texts] == [100, 0, 0, 100, 100]


def test_another_model_s_server_removes_a_conversation_from_its_end(bench: Bench) -> None:
    turn = some_ids(34, 280)
    write(bench, turn[:140])
    (first,) = bench.files()
    write(bench, turn)
    cache = bench.cache()
    budget = sum(path.stat().st_size for path in bench.files()) + 1000
    stored = bench.stored(cache, budget, identity="other")
    compute(bench.model, cache, some_ids(35, 80))
    stored.save(0, some_ids(35, 80), "", None)
    stored.close()
    assert first.exists()
    assert found(bench, turn[:140]) == 140


def test_what_a_state_is_about_to_go_on_from_is_not_removed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = some_ids(36, 280)
    write(bench, turn[:140])
    cache = bench.cache()
    stored = bench.stored(cache, budget=1 << 24)
    compute(bench.model, cache, turn)
    evictions: list[int] = []

    def copied_while_room_is_made(view: torch.Tensor) -> torch.Tensor:
        if not evictions:
            with suppress(OSError):
                stored._make_room(1 << 24)
            evictions.append(stored.stats.evictions)
        return copied(view)

    monkeypatch.setattr(stored_states, "copied", copied_while_room_is_made)
    stored.save(0, turn, "", None)
    stored.close()
    assert evictions == [0]
    assert found(bench, [*turn, 1]) == 280


def test_a_state_that_cannot_be_copied_leaves_no_trace(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = some_ids(37, 100)
    cache = bench.cache()
    stored = bench.stored(cache)
    compute(bench.model, cache, ids)
    with monkeypatch.context() as patched:
        patched.setattr(stored_states, "copied", out_of_memory)
        with pytest.raises(MemoryError):
            stored.save(0, ids, "", None)
    stored.save(0, ids, "", None)
    stored.close()
    assert found(bench, [*ids, 1]) == 100


def test_a_state_that_is_removed_after_it_was_found_is_not_counted_twice(bench: Bench) -> None:
    one, other = some_ids(38, 100), some_ids(39, 100)
    write(bench, one)
    cache = bench.cache()
    stored = bench.stored(cache, budget=int(1.5 * bench.files()[0].stat().st_size))
    at = stored.find([*one, 1], "")
    compute(bench.model, cache, other)
    stored.save(0, other, "", None)
    wait_until(lambda: stored.stats.written == 1)
    cache.reset(0)
    assert at is not None
    assert stored.restore(0, at) is None
    assert cache.length(0) == 0
    stored.close()
    assert stored.stats.nbytes == bench.files()[0].stat().st_size


def test_a_state_that_can_never_fit_displaces_none(bench: Bench) -> None:
    short, long = some_ids(16, 70), some_ids(17, 290)
    write(bench, short)
    size = bench.files()[0].stat().st_size
    write(bench, long, budget=size + 1000)
    assert found(bench, short) == 70


def test_files_that_a_killed_server_did_not_finish_are_removed(bench: Bench) -> None:
    ids = some_ids(18, 70)
    write(bench, ids)
    (state,) = bench.files()
    left = [state.with_name(f".{state.name}.{pid}.tmp") for pid in (1, 2)]
    for path in left:
        path.write_bytes(b"half")
    os.utime(left[0], (0, 0))
    assert found(bench, ids) == 70
    assert [path.exists() for path in left] == [False, True]  # the other may be another server's


def test_a_full_disk_costs_a_line_and_nothing_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(bench.folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    ids = some_ids(7, 100)
    with caplog.at_level(logging.WARNING):
        write(bench, ids)
    assert bench.files() == []
    assert len([line for line in caplog.messages if "a state was not saved to disk" in line]) == 1


def test_what_goes_on_from_a_state_that_could_not_be_written_is_not_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = some_ids(40, 280)
    cache = bench.cache()
    stored = bench.stored(cache)
    both_are_queued, calls = threading.Event(), count()

    def write_or_fail(path: Path, state: State) -> None:
        if next(calls) == 0:
            assert both_are_queued.wait(20)
            raise OSError("broken")
        write_state(path, state)

    monkeypatch.setattr(stored_states, "write_state", write_or_fail)
    compute(bench.model, cache, turn[:140])
    stored.save(0, turn[:140], "", None)
    compute(bench.model, cache, turn[140:])
    stored.save(0, turn, "", None)
    both_are_queued.set()
    stored.close()
    assert bench.files() == []
    assert (stored.stats.written, stored.stats.refused, stored.stats.nbytes) == (0, 2, 0)


def test_after_a_state_that_could_not_be_written_the_next_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = some_ids(41, 100), some_ids(42, 100)
    cache = bench.cache()
    stored = bench.stored(cache)
    compute(bench.model, cache, one)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(stored_states, "write_state", out_of_memory)
        stored.save(0, one, "", None)
        wait_until(lambda: stored.stats.refused == 1)
    assert "a state was not saved to disk: MemoryError" in caplog.text
    cache.reset(0)
    compute(bench.model, cache, other)
    stored.save(0, other, "", None)
    stored.close()
    assert found(bench, [*other, 1]) == 100


def test_a_state_that_is_written_takes_no_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = bench.cache()
    stored = bench.stored(cache)
    states: list[weakref.ref[State]] = []

    def write_and_tell(path: Path, state: State) -> None:
        write_state(path, state)
        states.append(weakref.ref(state))

    monkeypatch.setattr(stored_states, "write_state", write_and_tell)
    compute(bench.model, cache, some_ids(43, 100))
    stored.save(0, some_ids(43, 100), "", None)
    wait_until(lambda: bool(states) and states[0]() is None)
    stored.close()


def test_states_wait_in_bounded_memory(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    cache = bench.cache()
    stored = bench.stored(cache, pending=1000)
    compute(bench.model, cache, some_ids(8, 100))
    with caplog.at_level(logging.WARNING):
        PrefixCache(cache, PLENTY, stored).save(0, some_ids(8, 100))
    stored.close()
    assert stored.stats.refused == 1
    assert bench.files() == []
    assert "raise --prefix-cache" in caplog.text


def test_states_are_listed_and_removed_by_model(bench: Bench) -> None:
    write(bench, some_ids(9, 100))
    (of,) = states_in(bench.folder)
    assert (of.model, of.states) == ("tiny", 1)
    assert of.nbytes == bench.files()[0].stat().st_size
    remove_states(of)
    assert states_in(bench.folder) == []


def test_a_server_whose_states_were_removed_saves_new_ones(bench: Bench) -> None:
    turn = some_ids(44, 280)
    cache = bench.cache()
    stored = bench.stored(cache)
    compute(bench.model, cache, turn[:140])
    stored.save(0, turn[:140], "", None)
    wait_until(lambda: stored.stats.written == 1)
    (of,) = states_in(bench.folder)
    remove_states(of)
    assert not of.folder.exists()
    compute(bench.model, cache, turn[140:])
    stored.save(0, turn, "", None)
    stored.close()
    (again,) = states_in(bench.folder)
    assert (again.model, again.states) == ("tiny", 1)
    assert stat.S_IMODE(again.folder.stat().st_mode) == 0o700
    assert found(bench, [*turn, 1]) == 280


@pytest.mark.parametrize("length", [40, 100])
def test_a_state_that_was_removed_can_be_saved_again(bench: Bench, length: int) -> None:
    ids = some_ids(45, length)
    cache = bench.cache()
    stored = bench.stored(cache)
    compute(bench.model, cache, ids)
    stored.save(0, ids, "", None)
    wait_until(lambda: stored.stats.written == 1)
    remove_states(states_in(bench.folder)[0])
    stored.save(0, ids, "", None)
    stored.close()
    assert found(bench, [*ids, 1]) == length


def test_files_that_were_not_finished_are_removed_with_the_states(bench: Bench) -> None:
    write(bench, some_ids(46, 70))
    (state,) = bench.files()
    left = state.with_name(f".{state.name}.1.tmp")
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    (of,) = states_in(bench.folder)
    remove_states(of)
    assert not of.folder.exists()


def test_servers_that_share_a_directory_share_the_budget(bench: Bench) -> None:
    one, other, third = (some_ids(seed, 100) for seed in (47, 48, 49))
    alone = bench._replace(folder=bench.folder.parent / "alone")
    write(alone, one)
    budget = int(2.5 * alone.files()[0].stat().st_size)
    cache = bench.cache()
    stored = bench.stored(cache, budget)
    write(bench, one, other, budget=budget)
    compute(bench.model, cache, third)
    stored.save(0, third, "", None)
    stored.close()
    assert stored.stats.nbytes == sum(path.stat().st_size for path in bench.files())
    assert [found(bench, text) for text in (one, other, [*third, 1])] == [0, 100, 100]


def test_a_file_that_another_server_removes_while_this_one_starts_is_not_found(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = some_ids(51, 100)
    write(bench, ids)

    def read_and_removed(path: Path) -> StateHeader:
        header = read_header(path)
        path.unlink()
        return header

    monkeypatch.setattr(stored_states, "read_header", read_and_removed)
    assert found(bench, ids) == 0


def test_a_file_that_another_server_has_replaced_is_left_to_it(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    turn = some_ids(52, 280)
    cache, caches = bench.cache(), bench.cache()
    here, there = bench.stored(cache), bench.stored(caches)
    compute(bench.model, cache, turn)
    here.save(0, turn, "", None)
    wait_until(lambda: here.stats.written == 1)
    compute(bench.model, caches, turn[:140])
    there.save(0, turn[:140], "", None)
    compute(bench.model, caches, turn[140:])
    there.save(0, turn, "", None)
    there.close()
    at = here.find([*turn, 1], "")
    assert at is not None
    cache.reset(0)
    with caplog.at_level(logging.WARNING):
        assert here.restore(0, at) is None
    assert "another server has written it" in caplog.text
    assert here.find([*turn, 1], "") is None
    here.close()
    assert found(bench, [*turn, 1]) == 280


def test_a_model_whose_files_or_arithmetic_differ_is_another(tmp_path: Path) -> None:
    budget = MemoryBudget(1 << 30)
    original = golden_path("v41-a")
    identity = identity_of(open_safetensors(original), budget)
    assert identity_of(open_safetensors(original), budget) == identity
    copy = shutil.copytree(original, tmp_path / "copy", copy_function=shutil.copy)
    assert identity_of(open_safetensors(copy), budget) != identity


def test_an_engine_that_starts_again_goes_on_where_it_was(bench: Bench) -> None:
    loaded = load_all(golden_path("v41-a"))
    on_disk = StatesOnDisk(bench.folder, PLENTY, "this", "tiny")
    ids, texts, cached = some_ids(20, 150), [], []
    for _ in range(2):
        engine = Engine(
            loaded.model, loaded.tokenizer, max_sequences=2, max_context=CAPACITY,
            prefix_cache_bytes=1 << 26, on_disk=on_disk,
        )  # fmt: skip
        engine.start()
        answer = Answer()
        engine.submit(ids, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), answer)
        texts.append(answer.wait().token_ids)
        cached.append(answer.outputs[0].cached_tokens)
        engine.stop()
    loaded.model.close()
    assert cached == [0, 150]
    assert texts[0] == texts[1]


def test_a_folder_that_cannot_be_made_is_named(bench: Bench) -> None:
    bench.folder.parent.mkdir(exist_ok=True)
    bench.folder.write_text("a file")
    with pytest.raises(ConfigError, match="no states can be kept there"):
        bench.stored(bench.cache())
