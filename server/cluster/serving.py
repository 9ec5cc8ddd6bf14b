"""`loci serve --cluster`: a model in parts, prepared and brought up like one on this machine."""

from __future__ import annotations

import atexit
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prometheus_client import CollectorRegistry

from engine.cluster.stages import StagedModel
from engine.drafts.choice import drafters_of
from engine.embedded import model_path
from engine.engine import Engine
from engine.families.loader import Loaded, OpenedModel, open_model
from engine.kv_pool import PoolSize
from memory.checkpoint.part import Span
from memory.planner.stages import spread
from quant.errors import ConfigError
from server.cluster.fingerprint import fingerprint
from server.cluster.metrics import StageCollector
from server.cluster.on_machine import Look, Wish, passed
from server.cluster.ray_stages import RayStage, check_installed, connect, get, looks
from server.serving.service import Served, served_names
from server.settings import Settings

log = logging.getLogger("loci")

# Settings that are about this machine, or that parts cannot do yet.
NOT_TOGETHER = {
    "experts": "convert the checkpoint with `loci quantize`",
    "prefix_disk": "states of prefixes stay in the memory of their machines",
    "aside_disk": "sequences that are put aside are computed again",
    "measured_file": "it is of one machine",
    "draft_model": "texts are looked up for drafts (--drafts lookup)",
}


@dataclass(frozen=True)
class Prepared:
    """A model in parts about to be brought up: its settings and headers have been checked, here."""

    settings: Settings
    names: tuple[str, ...]
    opened: OpenedModel


def prepare(settings: Settings) -> Prepared:
    """Check what can be checked before any other machine is asked. Raises LociError."""
    check_installed()
    refuse_together(settings, "--cluster", NOT_TOGETHER)
    if settings.prompt_products != "exact":
        raise ConfigError("--prompt-products and --cluster do not go together: parts multiply exactly")
    if settings.drafts == "mtp":
        raise ConfigError("--drafts mtp and --cluster do not go together: parts do not read draft layers")
    path = model_path(settings.model)
    opened = open_model(path, settings.max_model_len)
    if not opened.family.cuts(opened.checkpoint):
        raise ConfigError(f"{path}: the {opened.family.name} family runs on one machine only")
    return Prepared(settings, served_names(settings, path), opened)


def refuse_together(settings: Settings, flag: str, reasons: Mapping[str, str]) -> None:
    """Raises ConfigError where one of the settings that `reasons` name was given beside `flag`."""
    for name, why in reasons.items():
        if getattr(settings, name) not in (None, "0"):
            raise ConfigError(f"--{name.replace('_', '-')} and {flag} do not go together: {why}")


def bring_up(prepared: Prepared, registry: CollectorRegistry) -> Served:
    """Load the parts on their machines and start the engine here. Raises LociError."""
    settings, opened = prepared.settings, prepared.opened
    assert settings.cluster is not None
    passed_on = passed(settings) | {"model": str(opened.checkpoint.path)}
    nodes = connect(settings.cluster).nodes
    found = looks(passed_on, nodes)
    check_copies(found, fingerprint(opened.checkpoint))
    stages, spans = _stages(settings, opened, passed_on, nodes, found)
    wishes: list[Wish] = [get(call) for call in [stage.ask_wish() for stage in stages]]
    agreed: dict[str, Any] = {
        "max_num_seqs": min(wish.sequences for wish in wishes),
        "max_model_len": min(wish.context for wish in wishes),
        "prefill_chunk": min(wish.prefill_chunk for wish in wishes),
    }
    slots, context = agreed["max_num_seqs"], agreed["max_model_len"]
    parts = [get(call) for call in [stage.ask_load(agreed, slots) for stage in stages]]
    model = StagedModel(stages, parts, spans)
    model.info = replace(model.info, name=opened.info.name, eos_token_ids=opened.info.eos_token_ids)
    loaded = Loaded(model, opened.tokenizer, opened.chat, opened.components, opened.sampling)
    engine = Engine(
        model,
        opened.tokenizer,
        max_sequences=slots,
        max_context=context,
        pool=PoolSize(may_shorten=settings.max_model_len is None),
        prefill_chunk=agreed["prefill_chunk"],
        prefill_step_s=settings.prefill_step_ms / 1000,
        max_waiting=settings.max_waiting,
        drafters=drafters_of(settings.drafts, loaded, slots, context),
        draft_tokens=settings.draft_tokens,
    )
    atexit.register(model.close)
    engine.start()
    registry.register(StageCollector(model))
    log.info("%d sequences of up to %s tokens on %d stages", slots, f"{engine.max_context:,}", len(stages))
    name, *aliases = prepared.names
    return Served(
        name, loaded, engine, aliases=tuple(aliases), cuts_answers=settings.max_tokens_overflow == "cut"
    )


def check_copies(found: Sequence[Look], own: str) -> None:
    """Raises ConfigError where a machine's checkpoint or version is another."""
    for each in found:
        if each.fingerprint != own:
            raise ConfigError(
                f"{each.host}: {each.path} is not the same checkpoint as here; copy it again, or set "
                "LOCI_STAGE_MODEL there to where the right one is"
            )
    versions = Counter(each.version for each in found)
    if len(versions) > 1:
        raise ConfigError(f"the machines have different versions of Loci: {', '.join(sorted(versions))}")


def _stages(
    settings: Settings,
    opened: OpenedModel,
    passed_on: dict[str, Any],
    nodes: Sequence[str],
    found: Sequence[Look],
) -> tuple[list[RayStage], list[Span]]:
    """An actor for each part, the parts in proportion to the memory of their machines."""
    count = settings.stages or max(2, len(nodes))
    at = [number % len(nodes) for number in range(count)]
    at.sort()  # neighbours share a machine
    on_each = Counter(at)
    kv_format = opened.kv_format(settings.kv_format)
    shape = opened.family.loaded_shape(opened.checkpoint, kv_format)
    rooms = [found[node].room / on_each[node] for node in at]
    spans = spread(shape, opened.family.cuts(opened.checkpoint), rooms)
    if settings.dram_budget is None and max(on_each.values()) > 1:
        log.warning("several stages share a machine: each plans for all of its memory; set --dram-budget")
    stages = []
    for node, span in zip(at, spans, strict=True):
        log.info("%s on %s", span, found[node].host)
        threads = max(1, found[node].threads // on_each[node])
        stages.append(RayStage(passed_on, span, nodes[node], threads))
    return stages, spans
