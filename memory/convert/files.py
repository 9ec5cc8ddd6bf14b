"""Carry out a conversion plan: shard by shard, on all cores, resumable, verified, never over existing files.

While a conversion runs, DST/.conversion holds what it is (`plan.json`), the shard being written
(`NAME.part`) and the errors of finished shards (`NAME.json`). A shard is renamed into DST once it is
complete and read back; config.json comes last, so nothing can load a conversion that was cut short.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.safetensors_files import INDEX_NAME, open_safetensors
from memory.convert.plan import Choices, Convert, Plan, ShardPlan, job_bytes, make_plan
from memory.convert.units import Done, run_unit, units_of
from memory.convert.verified import in_parallel, verified_file, worker_pool
from memory.hardware.detect import usable_cores
from quant.convert import Error
from quant.errors import BudgetError, ConfigError
from quant.packed import Format

WORK_NAME = ".conversion"
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".md", ".model")
SPARE_BYTES = 64 << 20
# Called from one thread with bytes of the source that are done, and those that there are.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class TensorError:
    """What converting one matrix cost; bytes are those of codes and scales."""

    name: str
    source: str
    target: str
    relative_error: float
    largest_error: float
    source_bytes: int
    target_bytes: int


def convert_checkpoint(
    source: Path, destination: Path, choices: Choices, on_progress: OnProgress, workers: int | None = None
) -> list[TensorError]:
    """Convert the safetensors checkpoint `source` into the new directory `destination`.

    Goes on where an earlier call with the same source and choices was cut short. Memory is a few
    megabytes a worker; `workers` defaults to the cores of the machine. Returns the error of each
    converted matrix. Raises ConfigError for a choice that does not fit the model or a destination
    that is in use, CheckpointError for damaged files, BudgetError where the disk is too small.
    """
    checkpoint = open_safetensors(source)
    plan = make_plan(checkpoint, choices)
    with _work_directory(checkpoint, plan, destination) as work:
        missing = [shard for shard in plan.shards if not _is_finished(shard, destination, work)]
        _check_disk(destination, missing)
        done_bytes = plan.source_bytes - sum(job_bytes(job) for shard in missing for job in shard.jobs)
        on_progress(done_bytes, plan.source_bytes)
        with worker_pool(workers or usable_cores()) as pool:
            for shard in missing:
                for read in _write_shard(shard, destination, work, pool):
                    done_bytes += read
                    on_progress(done_bytes, plan.source_bytes)
        return _finish(checkpoint, plan, destination, work)


@contextmanager
def _work_directory(checkpoint: Checkpoint, plan: Plan, destination: Path) -> Iterator[Path]:
    """Claim `destination` for this plan, alone."""
    work = destination / WORK_NAME
    if destination.exists() and not destination.is_dir():
        raise ConfigError(f"{destination}: is a file; name a new directory")
    if destination.is_dir() and not work.is_dir() and any(destination.iterdir()):
        raise ConfigError(f"{destination}: is not empty; name a new directory (nothing is overwritten)")
    work.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(checkpoint, plan)
    with (work / "plan.json").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{destination}: another conversion is writing here") from None
        file.seek(0)
        text = file.read()
        if not text:
            file.write(fingerprint)
            file.flush()
        elif text != fingerprint:
            raise ConfigError(
                f"{destination}: holds an unfinished conversion with another source or other options; "
                "repeat the command with those to finish it, or delete the directory"
            )
        yield work


def _fingerprint(checkpoint: Checkpoint, plan: Plan) -> str:
    """What must be the same for a later call to go on: the planned files, and the source's files."""
    digest = hashlib.sha256(json.dumps(plan.config, sort_keys=True).encode())
    for shard in plan.shards:
        digest.update(shard.header)
    stats = {entry.file: entry.file.stat() for entry in checkpoint.entries.values()}
    files = {file.name: [stat.st_size, stat.st_mtime_ns] for file, stat in sorted(stats.items())}
    return json.dumps({"plan": digest.hexdigest(), "source": files})


def _is_finished(shard: ShardPlan, destination: Path, work: Path) -> bool:
    """True for a shard that an earlier call renamed into place."""
    file = destination / shard.name
    return file.is_file() and file.stat().st_size == shard.nbytes and (work / f"{shard.name}.json").is_file()


def _check_disk(destination: Path, missing: list[ShardPlan]) -> None:
    needed = sum(shard.nbytes for shard in missing) + SPARE_BYTES
    free = shutil.disk_usage(destination).free
    if free < needed:
        raise BudgetError(
            f"{destination}: needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB is free; free some "
            "space, or name a directory on another disk"
        )


def _write_shard(shard: ShardPlan, destination: Path, work: Path, pool: ThreadPoolExecutor) -> Iterator[int]:
    """Write one shard; yields the source bytes of each unit as it is done."""
    part = work / f"{shard.name}.part"
    results: list[Done] = []
    with verified_file(part, shard.header, shard.nbytes, pool) as (output, written):
        for done in in_parallel(pool, (partial(run_unit, unit, output) for unit in units_of(shard))):
            results.append(done)
            written += done.written
            yield done.read_bytes
    errors = [asdict(error) for error in _tensor_errors(results)]
    (work / f"{shard.name}.json").write_text(json.dumps(errors))
    part.rename(destination / shard.name)


def _tensor_errors(results: list[Done]) -> list[TensorError]:
    """Errors of a shard's converted matrices, summed over their units."""
    jobs: dict[str, Convert] = {}
    errors: dict[str, Error] = {}
    for done in results:
        if isinstance(done.unit.job, Convert) and done.error is not None:
            name = done.unit.job.weight.name
            jobs[name] = done.unit.job
            errors[name] = errors.get(name, Error()) + done.error
    return [
        TensorError(
            name=name,
            source=_name_of(job.source),
            target=_name_of(job.target),
            relative_error=errors[name].relative,
            largest_error=errors[name].largest,
            source_bytes=job_bytes(job),
            target_bytes=job.weight_output.nbytes + (job.scale_output.nbytes if job.scale_output else 0),
        )
        for name, job in sorted(jobs.items())
    ]


def _name_of(form: Format | torch.dtype) -> str:
    return form.name if isinstance(form, Format) else str(form).removeprefix("torch.")


def _finish(checkpoint: Checkpoint, plan: Plan, destination: Path, work: Path) -> list[TensorError]:
    """Index, tokenizer and the like, config; then the working directory goes."""
    errors = [
        TensorError(**fields)
        for shard in plan.shards
        for fields in json.loads((work / f"{shard.name}.json").read_text())
    ]
    _write_json(work, destination / INDEX_NAME, plan.index)
    for file in sorted(checkpoint.path.iterdir()):
        is_ours = file.name in ("config.json", INDEX_NAME)
        if (
            file.is_file()
            and not is_ours
            and (file.suffix in COPIED_SUFFIXES or file.name.startswith("LICENSE"))
        ):
            shutil.copyfile(file, work / "copy.part")
            (work / "copy.part").rename(destination / file.name)
    _write_json(work, destination / "config.json", plan.config)
    # Renamed first: half removed, it would look like a conversion that has not written anything yet.
    shutil.rmtree(work.rename(destination / f"{WORK_NAME}.done"))
    return errors


def _write_json(work: Path, file: Path, value: dict[str, Any]) -> None:
    part = work / "json.part"
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    part.rename(file)
