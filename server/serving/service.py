"""The model being served: loaded in the background, stopped at the end."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from engine.cache.aside import AsideOnDisk
from engine.cache.identity import identity_of
from engine.cache.pages import largest
from engine.cache.state_folders import states_folder
from engine.cache.stored_states import StatesOnDisk
from engine.drafts.choice import drafters_of
from engine.embedded import model_path
from engine.engine import Engine
from engine.families.loader import Loaded, OpenedModel, open_model
from engine.kv_pool import MIN_CONTEXT, PoolSize, written
from engine.warm_up import warm_up
from memory.checkpoint.checkpoint import name_of
from memory.hardware.detect import available_memory_bytes
from memory.hardware.profiles import parse_bytes
from memory.pages.spaces import is_paged
from memory.planner.budget import MemoryBudget, unused_gpus_notice
from memory.planner.placement import Workload
from quant.errors import BudgetError, ConfigError
from server.http.errors import ApiError, unavailable
from server.metrics import Metrics
from server.serving.chunk import chunk_here
from server.serving.draft_costs import draft_costs
from server.serving.generation import Generation
from server.serving.wakeups import Wakeups
from server.settings import Settings

log = logging.getLogger("loci")

# Tokens of a sequence that is neither short nor long.
DEFAULT_CONTEXT = 8192
# The KV pool's share of the memory that weights leave free, and of GPUs' memory.
KV_SHARE = 0.25
KV_SHARE_OF_GPUS = 0.1
# The prefix cache's share of the memory left by weights and KV cache.
PREFIX_SHARE = 0.1


@dataclass(frozen=True)
class Served:
    """A loaded model: its public name, its parts, and its start time (seconds since 1970).

    aliases       further names that are listed
    cuts_answers  answers asked to be longer than the context are as long as it allows, not refused
    """

    name: str
    loaded: Loaded
    engine: Engine
    created: int = field(default_factory=lambda: int(time.time()))
    aliases: tuple[str, ...] = ()
    cuts_answers: bool = True

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.loaded.model.info.vocab_size

    def default_max_tokens(self, wanted: int | None, prompt_tokens: int) -> int | None:
        """The default length of answers, limited to the context left after the prompt."""
        return None if wanted is None else max(1, min(wanted, self.engine.max_context - prompt_tokens))

    def answer_limit(self, wanted: int | None, prompt_tokens: int) -> int | None:
        """The length of an answer that a client has set, None for what the context holds.

        What does not fit is cut to the room that is left, unless answers are not to be cut or there is no
        room: the engine refuses those.
        """
        room = self.engine.max_context - prompt_tokens if wanted is not None and self.cuts_answers else 0
        return min(wanted, room) if wanted is not None and room > 0 else wanted


@dataclass(frozen=True)
class Prepared:
    """A model about to be loaded, whose settings, headers and small files have been checked."""

    settings: Settings
    names: tuple[str, ...]
    opened: OpenedModel
    budget: MemoryBudget
    prefix_bytes: int | None
    kv_bytes: int | None
    free_bytes: int


def prepare(settings: Settings) -> Prepared:
    """Check the model that `settings` name before its weights are read.

    Raises LociError.
    """
    path = model_path(settings.model)
    names = tuple(dict.fromkeys(settings.served_model_name)) or (name_of(path),)
    prefix_bytes = _parsed_prefix_cache(settings)
    free_bytes = available_memory_bytes()
    kv_bytes = None if settings.kv_budget is None else parse_bytes(settings.kv_budget)
    if notice := unused_gpus_notice(settings.devices):
        log.warning("%s", notice)
    budget = MemoryBudget.of_this_machine(settings.dram_budget, settings.devices)
    opened = open_model(path, settings.max_model_len, settings.experts)
    budget = replace(budget, kv_format=opened.kv_format(settings.kv_format))
    workload = _workload(settings, opened, budget, kv_bytes)
    chunk = settings.prefill_chunk or chunk_here(opened, budget, workload, settings.devices)
    budget = replace(budget, workload=replace(workload, prefill_chunk=chunk))
    return Prepared(settings, names, opened, budget, prefix_bytes, kv_bytes, free_bytes)


def bring_up(prepared: Prepared) -> Served:
    """Load a prepared model and start its engine. Raises LociError where it does not fit into memory."""
    settings, budget, prefix_bytes = prepared.settings, prepared.budget, prepared.prefix_bytes
    loaded = prepared.opened.load(budget, settings.prompt_products)
    if any(not gpu.is_virtual for gpu in budget.gpus):
        log.info("compiling GPU kernels that are not cached yet")
        most_tokens = min(budget.workload.prefill_chunk, budget.workload.context)
        warm_up(loaded.model, most_tokens)
        if loaded.prompt_products is not None:
            with loaded.prompt_products():
                warm_up(loaded.model, most_tokens)
    context = settings.max_model_len or loaded.model.info.max_context
    kv_bytes = prepared.kv_bytes
    if kv_bytes is None:
        kv_bytes = int(available_memory_bytes() * KV_SHARE)
    if prefix_bytes is None:
        # Weights and KV cache may not have been touched yet, so the system does not count them all.
        elsewhere = {gpu.name for gpu in budget.gpus if not gpu.is_virtual}
        weights = sum(n for tier, n in loaded.model.tier_bytes.items() if tier not in elsewhere)
        kv = min(loaded.model.cache_bytes(settings.max_num_seqs, context), kv_bytes)
        left = min(prepared.free_bytes - weights - kv, available_memory_bytes())
        prefix_bytes = max(0, int(left * PREFIX_SHARE))
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        max_sequences=settings.max_num_seqs,
        max_context=context,
        pool=PoolSize(kv_bytes, prepared.kv_bytes is not None, settings.max_model_len is None),
        prefill_chunk=budget.workload.prefill_chunk,
        prefill_step_s=settings.prefill_step_ms / 1000,
        max_waiting=settings.max_waiting,
        prefix_cache_bytes=prefix_bytes,
        on_disk=_states_on_disk(prepared, prefix_bytes),
        aside=_aside_on_disk(settings),
        prompt_products=loaded.prompt_products,
        drafters=drafters_of(settings.drafts, loaded.model),
        draft_tokens=settings.draft_tokens,
        draft_costs=draft_costs(prepared.opened, budget, budget.workload, settings.devices),
    )
    log.info("%s", _about(engine, context))
    log.info("prompts are computed in chunks of up to %d tokens", budget.workload.prefill_chunk)
    engine.start()
    name, *aliases = prepared.names
    cuts = settings.max_tokens_overflow == "cut"
    return Served(name, loaded, engine, aliases=tuple(aliases), cuts_answers=cuts)


def _workload(
    settings: Settings, opened: OpenedModel, budget: MemoryBudget, kv_bytes: int | None
) -> Workload:
    """What GPUs keep room for when the model is loaded. Raises BudgetError where `--kv-budget` has no room
    for one sequence."""
    context, sequences = settings.max_model_len or opened.info.max_context, settings.max_num_seqs
    if not budget.gpus:
        return Workload(context, sequences)
    shape = opened.family.shape(opened.checkpoint, budget.kv_format)

    def nbytes(tokens: int) -> int:
        return shape.kv_bytes(tokens, 1) - shape.kv_bytes(0, 1)

    room = kv_bytes
    if room is None:
        share = KV_SHARE_OF_GPUS * sum(gpu.budget_bytes for gpu in budget.gpus)
        wanted = max(context, min(context, DEFAULT_CONTEXT) * sequences)
        room = max(min(int(share), nbytes(wanted)), nbytes(settings.max_model_len or MIN_CONTEXT))
    tokens = largest(lambda count: nbytes(count) <= room, sequences * context)
    of_one = tokens if all(is_paged(gpu.device) for gpu in budget.gpus) else tokens // sequences
    if settings.max_model_len is not None and of_one < context:
        raise BudgetError(
            f"a sequence of {context:,} tokens needs {nbytes(context) / 1e6:,.1f} MB of KV cache, but the "
            f"pool has {room / 1e6:,.1f} MB: raise --kv-budget to {written(nbytes(context))}, or lower "
            f"--max-model-len to {of_one}"
        )
    return Workload(min(context, of_one), sequences, kv_tokens=tokens)


def _about(engine: Engine, wanted: int) -> str:
    """The pool in a line; and what would help where it holds no sequence as long as wanted."""
    pages, tokens, longest = engine.pool.cache.pages, engine.pool.tokens, engine.pool.context
    text = f"KV pool: {pages.nbytes(tokens) / 1e6:,.1f} MB, {tokens:,} tokens in all"
    text += f", up to {longest:,} in a sequence"
    if longest < wanted:
        text += f"; --kv-budget {written(pages.nbytes(wanted))} would hold the {wanted:,} that the model can"
    return text


def _parsed_prefix_cache(settings: Settings) -> int | None:
    """The prefix cache's budget in bytes, None for the default. Raises ConfigError."""
    text = settings.prefix_cache
    if text is None:
        return None
    return 0 if text.strip() == "0" else parse_bytes(text)


def _states_on_disk(prepared: Prepared, prefix_bytes: int) -> StatesOnDisk | None:
    """Where states of prompts are written, if anywhere. Raises ConfigError."""
    settings = prepared.settings
    if settings.prefix_disk is None or settings.prefix_disk.strip() == "0":
        return None
    if not prefix_bytes:
        raise ConfigError("--prefix-disk needs memory for states on their way to disk: raise --prefix-cache")
    return StatesOnDisk(
        settings.prefix_dir or states_folder(),
        parse_bytes(settings.prefix_disk),
        identity_of(prepared.opened.checkpoint, prepared.budget, settings.prompt_products),
        prepared.names[0],
    )


def _aside_on_disk(settings: Settings) -> AsideOnDisk | None:
    """Where sequences are put aside on disk, if anywhere. Raises ConfigError."""
    if settings.aside_disk is None or settings.aside_disk.strip() == "0":
        return None
    return AsideOnDisk(settings.prefix_dir or states_folder(), parse_bytes(settings.aside_disk))


class Service:
    """Holds the model once it is loaded. Handlers ask it for a Generation.

    typed   what the operator called the model, which it answers to as well
    """

    def __init__(self, settings: Settings, metrics: Metrics, typed: str | None = None) -> None:
        self.settings = settings
        self._typed = typed
        self.metrics = metrics
        self.failure: Exception | None = None
        self.is_draining = False
        self._served: Served | None = None
        self._loader: threading.Thread | None = None
        self._wakeups: Wakeups | None = None  # made on the event loop

    def load_in_background(self, bring_up: Callable[[], Served], when_done: Callable[[], None]) -> None:
        """Start loading in a thread; `when_done` runs on this event loop, on success and on failure."""
        loop = asyncio.get_running_loop()

        def work() -> None:
            try:
                served = bring_up()
            except Exception as error:
                self.failure = error
            else:
                self.metrics.observe_engine(served.engine.stats, served.loaded.model)
                self._served = served
            with suppress(RuntimeError):  # the loop has closed: the server was stopped meanwhile
                loop.call_soon_threadsafe(when_done)

        # A daemon, so that a signal during a long load ends the process.
        self._loader = threading.Thread(target=work, name="loci-load", daemon=True)
        self._loader.start()

    @property
    def is_loading(self) -> bool:
        """True while the loading thread runs."""
        return self._loader is not None and self._loader.is_alive()

    @property
    def is_alive(self) -> bool:
        """False once the engine's thread has died."""
        return self._served is None or self._served.engine.is_alive

    @property
    def is_failing(self) -> bool:
        """True while the engine works, but its last step failed (a disk that cannot be read)."""
        return self._served is not None and self._served.engine.stats().is_failing

    @property
    def is_ready(self) -> bool:
        """True while requests can be answered."""
        return self._served is not None and self._served.engine.is_alive and not self.is_draining

    @property
    def served(self) -> Served:
        """The model. Raises ApiError 503 while it loads or the server stops, or when its engine has died."""
        if self.is_draining:
            raise unavailable("the server is shutting down and accepts no new requests", "server_stopping")
        if self._served is None:
            raise unavailable("the model is still loading; try again soon", "model_loading")
        if not self._served.engine.is_alive:
            raise unavailable(
                "the engine has stopped; ask the server's operator to restart it", "engine_stopped"
            )
        return self._served

    def named(self, model: str | None) -> Served:
        """The model if that is one of its names, or if none is given. Raises ApiError 404 for any other."""
        served = self.served
        known = (None, served.name, *served.aliases, self._typed)
        if model not in known and not self.settings.any_model:
            raise ApiError(
                404,
                f"the model {model!r} does not exist; this server serves {served.name!r}",
                param="model",
                code="model_not_found",
            )
        return served

    def new_generation(self) -> Generation:
        """An empty Generation on the engine, under this server's time limit."""
        if self._wakeups is None:
            self._wakeups = Wakeups(self.settings.stream_interval_ms / 1000)
            self.served.engine.between_steps = self._wakeups.flush
        return Generation(self.served.engine, self.metrics, self._wakeups, self.settings.request_timeout_s)

    def drain(self) -> None:
        """Refuse new requests from now on; running ones continue."""
        self.is_draining = True

    def stop(self) -> None:
        """Stop the engine; what still runs is aborted."""
        if self._served is not None:
            self._served.engine.stop()
