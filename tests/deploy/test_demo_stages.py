"""Draft stages as they are trained compute what the engine drafts, and the demonstration model's are good."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from engine.bench.drafts import SMALL_TALK, chats
from engine.drafts.base import Rows
from engine.drafts.dspark import DSpark
from engine.engine import Engine
from engine.families.deepseek_v41.config import parse_config
from engine.families.loader import Loaded, load
from engine.output import Output
from engine.sampling.params import SamplingParams
from export_stages import FILE, stage_tensors
from layers import Precision
from memory.planner.budget import MemoryBudget
from model import Model
from released import from_released, read_files
from stages import Anchors, Stages

DEMO = Path(__file__).resolve().parents[2] / "deploy/demo/loci-demo"
MOST_BYTES = 40_000_000


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load(DEMO, MemoryBudget(1 << 30), drafts="auto")


def trained() -> tuple[Model, Stages]:
    """The files' model and stages in the form that is trained."""
    config, stored = parse_config(json.loads((DEMO / "config.json").read_text())), read_files(DEMO)
    model, stages = Model(config).eval(), Stages(config)
    from_released(model, stored)
    last = stages.shape.stages - 1
    shared = ("main_proj", "main_norm", "norm", "markov_head", "confidence_head")
    of_parts = {
        name.replace("mtp.0." if name.startswith("mtp.0.main_") else f"mtp.{last}.", "", 1)
        if name.split(".")[2] in shared
        else name: tensor
        for name, tensor in stored.items()
        if name.startswith("mtp.")
    }  # fmt: skip
    from_released(stages, of_parts)
    return model, stages


@pytest.mark.slow
@torch.no_grad()
def test_trained_stages_draft_what_the_engine_drafts(demo: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Precision, "products", torch.float32)
    model, stages = trained()
    generator = torch.Generator().manual_seed(3)
    captures = torch.randn(1, 128, stages.main_proj.weight.shape[1], generator=generator)
    ids = torch.randint(20, 4000, (1, 128), generator=generator)
    place = 90
    anchors = Anchors(torch.tensor([0]), torch.tensor([place]))
    drafted = stages(model, captures, ids, torch.zeros_like(ids), anchors)
    tokens = stages.chain(model, drafted, ids[0, place + 1 : place + 2])[0].tolist()

    assert demo.own_drafts is not None
    drafter = demo.own_drafts.drafter(1, 256)
    assert isinstance(drafter, DSpark)
    drafter.open(1, [])
    drafter.observe([Rows(1, 0, ids[0, : place + 1].tolist(), captures[0, : place + 1])])
    found = drafter.blocks([drafter._known[1]], [int(ids[0, place + 1])])
    assert found.token_ids[0].tolist() == tokens
    base = model.head(stages.norm(drafted.states))[0, 0] + stages.markov_head.head(
        stages.markov_head.embed(ids[0, place + 1])
    )
    assert (torch.from_numpy(found.logits[0, 0]) - base).abs().max() < 1e-3


def test_exported_stages_have_the_names_and_sizes_of_releases(demo: Loaded) -> None:
    config = parse_config(json.loads((DEMO / "config.json").read_text()))
    named = dict(stage_tensors(Stages(config)))
    index = json.loads((DEMO / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name for name, file in index.items() if file == FILE} == set(named)
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= MOST_BYTES
    assert demo.own_drafts is not None


@pytest.mark.slow
def test_most_drafts_of_small_talk_are_accepted_and_no_answer_changes(demo: Loaded) -> None:
    assert demo.own_drafts is not None
    answers: list[list[list[int]]] = []
    for drafters in ([], [demo.own_drafts.drafter(1, 512)]):
        engine = Engine(
            demo.model, demo.tokenizer, max_sequences=1, max_context=512, drafters=drafters, always_draft=5
        )
        engine.start()
        answers.append([answer(engine, prompt) for prompt in chats(demo, SMALL_TALK)])
        stats = engine.stats().drafts
        engine.stop()
    assert answers[0] == answers[1]
    assert stats is not None
    of_stages = stats.by_drafter["dspark"]
    assert of_stages.accepted > 2 * of_stages.steps


def answer(engine: Engine, prompt: list[int]) -> list[int]:
    ids: list[int] = []
    ended = threading.Event()

    def on_output(output: Output) -> None:
        ids.extend(output.token_ids)
        if output.finish_reason is not None:
            ended.set()

    engine.submit(prompt, SamplingParams(temperature=0.0, max_tokens=60), on_output)
    assert ended.wait(60)
    return ids
