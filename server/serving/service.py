"""The model being served: loaded in the background, stopped at the end."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from engine.cache.aside import NO_ASIDE, AsideOnDisk
from engine.cache.identity import identity_of
from engine.cache.state_folders import states_folder
from engine.cache.stored_states import StatesOnDisk
from engine.drafts.choice import drafters_of, weights_wanted
from engine.embedded import model_path
from engine.engine import Engine
from engine.families.loader import Loaded, OpenedModel, open_model
from engine.kv_pool import PoolSize
from engine.warm_up import warm_up
from memory.checkpoint.checkpoint import name_of
from memory.hardware.profiles import parse_bytes, written
from memory.planner.budget import MemoryBudget
from memory.user_files import make_folder
from quant.errors import ConfigError
from server.http.errors import ApiError, unavailable
from server.metrics import Metrics
from server.plan_metrics import LearnedFile, PlanCollector, PlanWatch
from server.serving.answering import Answering
from server.serving.draft_costs import draft_costs
from server.serving.generation import Generation
from server.serving.planned import Planned, planned
from server.serving.wakeups import Wakeups
from server.settings import Settings

log = logging.getLogger("loci")

# Tokens of a sequence that is neither short nor long.
DEFAULT_CONTEXT = 8192


@dataclass(frozen=True)
class Served:
    """A loaded model: its public name, its parts, and its start time (seconds since 1970).

    aliases       further names that are listed
    cuts_answers  answers asked to be longer than the context are as long as it allows, not refused
    watch         the plan beside what runs
    """

    name: str
    loaded: Loaded
    engine: Answering
    created: int = field(default_factory=lambda: int(time.time()))
    aliases: tuple[str, ...] = ()
    cuts_answers: bool = True
    watch: PlanWatch | None = None

    @property
    def engine_here(self) -> Engine:
        """Its engine, of a model that is in this process."""
        assert isinstance(self.engine, Engine)
        return self.engine

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
    """A model about to be loaded, whose settings, headers and small files have been checked.

    settings  with what the plan has chosen where nothing was set
    states_bytes  of disk, for states of prompts; 0 where none are written
    aside     where sequences are put aside on disk, if anywhere
    """

    settings: Settings
    names: tuple[str, ...]
    opened: OpenedModel
    planned: Planned
    states_bytes: int = 0
    aside: AsideOnDisk | None = None

    @property
    def budget(self) -> MemoryBudget:
        """What loading may take."""
        return self.planned.budget


def served_names(settings: Settings, path: Path) -> tuple[str, ...]:
    """What clients may call the model in `path`, the first being its own name."""
    return tuple(dict.fromkeys(settings.served_model_name)) or (name_of(path),)


def prepare(settings: Settings) -> Prepared:
    """Check the disk and the model that `settings` name, before its weights are read.

    Raises LociError.
    """
    states_bytes = _disk_bytes(settings, settings.prefix_disk, "no states can be kept there")
    aside_bytes = _disk_bytes(settings, settings.aside_disk, NO_ASIDE)
    path = model_path(settings.model)
    opened = open_model(path, settings.max_model_len, settings.experts)
    found = planned(settings, opened)
    chosen = {"max_num_seqs": found.workload.sequences, "prefill_chunk": found.workload.prefill_chunk}
    if states_bytes and not found.workload.prefix_bytes:
        raise ConfigError("--prefix-disk needs memory for states on their way to disk: raise --prefix-cache")
    return Prepared(
        settings.model_copy(update=chosen),
        served_names(settings, path),
        opened,
        found,
        states_bytes,
        AsideOnDisk(_disk_folder(settings), aside_bytes) if aside_bytes else None,
    )


def bring_up(prepared: Prepared) -> Served:
    """Load a prepared model and start its engine. Raises LociError where it does not fit into memory."""
    settings, budget, workload = prepared.settings, prepared.budget, prepared.planned.workload
    drafts = weights_wanted(settings.drafts) if prepared.planned.own_drafts else "off"
    loaded = prepared.opened.load(budget, settings.prompt_products, drafts)
    if any(not gpu.is_virtual for gpu in budget.gpus):
        log.info("compiling GPU kernels that are not cached yet")
        most_tokens = min(workload.prefill_chunk, workload.context)
        warm_up(loaded.model, most_tokens)
        if loaded.prompt_products is not None:
            with loaded.prompt_products():
                warm_up(loaded.model, most_tokens)
    files = prepared.planned.small_model
    small = None if files is None else files.load(loaded.model.info.vocab_size)
    context = settings.max_model_len or workload.context
    kv_bytes = prepared.planned.plan.placement.pool_bytes()
    on_gpus = sum(kv_bytes.get(f"vram:{n}", 0) for n, gpu in enumerate(budget.gpus) if not gpu.is_virtual)
    kv_in_all = sum(kv_bytes.values())
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        max_sequences=workload.sequences,
        max_context=context,
        pool=PoolSize(
            kv_in_all,
            is_given=settings.kv_budget is not None,
            may_shorten=settings.max_model_len is None,
            on_host=kv_in_all - on_gpus,
        ),
        prefill_chunk=workload.prefill_chunk,
        prefill_step_s=settings.prefill_step_ms / 1000,
        max_waiting=settings.max_waiting,
        prefix_cache_bytes=workload.prefix_bytes,
        on_disk=_states_on_disk(prepared),
        aside=prepared.aside,
        prompt_products=loaded.prompt_products,
        drafters=drafters_of(settings.drafts, loaded, workload.sequences, context, small),
        draft_tokens=settings.draft_tokens,
        draft_costs=draft_costs(prepared.planned.shape, prepared.planned.plan.hardware, workload),
    )
    log.info("%s", _about(engine, settings.max_model_len or prepared.opened.info.max_context))
    log.info("prompts are computed in chunks of up to %d tokens", workload.prefill_chunk)
    engine.start()
    name, *aliases = prepared.names
    cuts = settings.max_tokens_overflow == "cut"
    of_drafts = sum(drafts.room for drafts in (loaded.own_drafts, small) if drafts is not None)
    of_drafts += prepared.planned.draft_keys
    watch = PlanWatch(prepared.planned, loaded.model, engine, of_drafts)
    return Served(name, loaded, engine, aliases=tuple(aliases), cuts_answers=cuts, watch=watch)


def _about(engine: Engine, wanted: int) -> str:
    """The pool in a line; and what would help where it holds no sequence as long as wanted."""
    pages, tokens, longest = engine.pool.cache.pages, engine.pool.tokens, engine.pool.context
    text = f"KV pool: {pages.nbytes(tokens) / 1e6:,.1f} MB, {tokens:,} tokens in all"
    text += f", up to {longest:,} in a sequence"
    if longest < wanted:
        text += f"; --kv-budget {written(pages.nbytes(wanted))} would hold the {wanted:,} that the model can"
    return text


def _disk_folder(settings: Settings) -> Path:
    """Where states are on disk."""
    return settings.prefix_dir or states_folder()


def _disk_bytes(settings: Settings, size: str | None, refusal: str) -> int:
    """Bytes of disk that a setting names, 0 for none. Raises ConfigError for what is no size, and where
    nothing can be written."""
    if size is None or size.strip() == "0":
        return 0
    nbytes = parse_bytes(size)
    make_folder(_disk_folder(settings), refusal)
    return nbytes


def _states_on_disk(prepared: Prepared) -> StatesOnDisk | None:
    """Where states of prompts are written, if anywhere."""
    settings = prepared.settings
    if not prepared.states_bytes:
        return None
    return StatesOnDisk(
        _disk_folder(settings),
        prepared.states_bytes,
        identity_of(prepared.opened.checkpoint, prepared.budget, settings.prompt_products),
        prepared.names[0],
    )


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
        self._learned: LearnedFile | None = None

    def load_in_background(self, bring_up: Callable[[], Served], when_done: Callable[[], None]) -> None:
        """Start loading in a thread; `when_done` runs on this event loop, on success and on failure."""
        loop = asyncio.get_running_loop()

        def work() -> None:
            try:
                served = bring_up()
            except Exception as error:
                self.failure = error
            else:
                of_model = served.engine.stats, served.loaded.model
                if served.watch is None:
                    self.metrics.observe_engine(*of_model)
                else:
                    self.metrics.observe_engine(*of_model, served.watch.kv_on_gpus)
                    self.metrics.registry.register(PlanCollector(served.watch))
                    if self.settings.measured_file is not None:
                        self._learned = LearnedFile(self.settings.measured_file, served.watch)
                self._served = served
            with suppress(RuntimeError):  # the loop has closed: the server was stopped meanwhile
                loop.call_soon_threadsafe(when_done)

        # A daemon, so that a signal during a long load ends the process.
        self._loader = threading.Thread(target=work, name="loci-load", daemon=True)
        self._loader.start()

    @property
    def max_sequences(self) -> int:
        """Sequences that are computed together, as set or chosen by the plan."""
        return (
            (self.settings.max_num_seqs or 1) if self._served is None else self._served.engine.max_sequences
        )

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
        return self._served is not None and self._served.engine.is_ready and not self.is_draining

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

    def new_generation(self, cache_salt: str) -> Generation:
        """An empty Generation on the engine, under this server's time limit."""
        if self._wakeups is None:
            self._wakeups = Wakeups(self.settings.stream_interval_ms / 1000)
            self.served.engine.between_steps = self._wakeups.flush
        timeout_s = self.settings.request_timeout_s
        return Generation(self.served.engine, self.metrics, self._wakeups, timeout_s, cache_salt)

    def drain(self) -> None:
        """Refuse new requests from now on; running ones continue."""
        self.is_draining = True

    def stop(self) -> None:
        """Stop the engine; what still runs is aborted."""
        if self._learned is not None:
            self._learned.close()
        if self._served is not None:
            self._served.engine.stop()
