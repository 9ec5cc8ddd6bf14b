# ruff: noqa: E402 -- the repository root must be importable before its packages are
"""Train the demonstration model, or go on with it.

    python deploy/demo/data.py          # once
    python deploy/demo/train.py         # again and again, until the schedule is done

Stops at SIGTERM or Ctrl-C after the step at hand, with everything saved; killed outright it loses a
few minutes. `stages.json` says what is trained for how long. Progress goes to `train.csv` and
`heldout.csv` in the data directory.
"""

from __future__ import annotations

import argparse
import csv
import math
import signal
import sys
import time
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np
import tokenizers
import torch
from torch import Tensor

from advice import Advice, advisors_for, context_keys
from batches import Corpus, Pass, Rows
from data import read_documents
from engine.families.deepseek_v41.config import parse_config
from engine.layers.engram_hash import build_token_map
from layers import Fusion, Precision
from loss import HeadLoss
from model import Hidden, Model
from optimisers import optimisers_for
from packing import alignment, lay_out, pack, targets
from paths import demo_directory
from released import from_released, read_files, trained_tokens
from rows import RowFinder
from schedule import Schedule, Stage
from shape import config_for
from state import TrainingState
from tables import COMPLETE, FOLDS, load_or_count

SEED = 41
CLIP = 1.0
INDEX_LOSS_WEIGHT = 0.2
BIAS_STEP = 0.005
IDLE, OVERWORKED = 0.5, 1.75  # shares of the mean load between which the routing bias rests
SAVE_EVERY_S = 300.0
HELD_OUT_EVERY_TOKENS = 500_000
HELD_OUT_ROWS = 24
MICRO_TOKENS = 4096


class Trainer:
    """One model in training: data in, steps, records out."""

    def __init__(self, directory: Path, schedule: Schedule) -> None:
        self.directory, self.schedule = directory, schedule
        tokenizer_file = directory / "tokenizer.json"
        if not tokenizer_file.exists():
            raise SystemExit(f"{tokenizer_file} is missing: run `python deploy/demo/data.py` first")
        self.config = config = parse_config(config_for(tokenizer_file))
        torch.manual_seed(SEED)
        self.model = Model(config).train()
        tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
        self.find_rows = RowFinder(config, build_token_map(tokenizer, config.vocab_size))
        self.step_tokens = alignment(config)
        self.optimisers = optimisers_for(self.model, Precision.products)
        self.corpus = corpus = Corpus(directory, schedule.mix, schedule.advice)
        self.tables = load_or_count(
            directory / "tables.safetensors", corpus.documents, config, self.find_rows
        )
        advised = np.flatnonzero(corpus.advised)
        self.advisors = (
            advisors_for(
                [corpus.documents[i] for i in advised], [int(i) % FOLDS for i in advised], config.vocab_size
            )
            if len(advised)
            else []
        )
        self.state = TrainingState(self.model, self.optimisers, self.tables.complete)
        self.stopping = False

    @torch.no_grad()
    def begin_with(self, checkpoint: Path) -> None:
        """Take over an exported checkpoint's weights, not its tables; moments and schedule begin anew."""
        if (checkpoint / "tokenizer.json").read_bytes() != (self.directory / "tokenizer.json").read_bytes():
            raise SystemExit(
                f"{checkpoint} has another vocabulary than {self.directory}: make the data with "
                f"`python deploy/demo/data.py --tokenizer {checkpoint / 'tokenizer.json'}`"
            )
        from_released(self.model, read_files(checkpoint))
        self.state.progress.earlier_tokens = trained_tokens(checkpoint)

    # -- one step -----------------------------------------------------------------------------

    def _forward(self, ids: Tensor, documents: Tensor, sets: Tensor, rounding: bool) -> Hidden:
        """A forward of some rows `[rows, context]`; sets: which tables each token reads."""
        values = self.tables.values(self.find_rows(ids, documents), sets.flatten(), rounding)
        return self.model(ids, documents, values)

    def _advice(self, batch: Rows, mask: Tensor) -> Advice | None:
        """Soft targets of the tokens in `mask` `[N]`, where any are wanted."""
        if not self.advisors:
            return None
        keys = context_keys(batch.ids, batch.documents).flatten(0, 1)
        return Advice(self.advisors, batch.advised.flatten()[mask], batch.folds.flatten()[mask], keys[mask])

    def step(self, batch: Rows, stage: Stage, rate: float) -> dict[str, float]:
        """One update from all rows; returns what the log shows."""
        following, known = targets(batch.ids, batch.documents)
        total = int(known.sum())
        load = torch.zeros(self.config.num_hidden_layers, self.config.n_routed_experts)
        loss_sum = index_sum = 0.0
        rows = max(1, MICRO_TOKENS // stage.context)
        for first in range(0, len(batch), rows):
            part = slice(first, first + rows)
            some, mask = batch[part], known[part].flatten()
            hidden = self._forward(some.ids, some.documents, some.folds, stage.rounding)
            share = int(mask.sum()) / total
            wanted = following[part].flatten()[mask]
            loss = HeadLoss.apply(
                hidden.states[mask],
                self.model.head.matrix(),
                wanted,
                self._advice(some, mask),
                Precision.products,
            )
            index_loss = torch.stack(hidden.index_losses).mean()
            ((loss + INDEX_LOSS_WEIGHT * index_loss) * share).backward()
            loss_sum += float(loss.detach()) * share
            index_sum += float(index_loss.detach()) * share
            real = some.documents.flatten() >= 0
            for layer, chosen in enumerate(hidden.router_ids):
                load[layer] += chosen[real].flatten().bincount(minlength=load.shape[1])
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP))
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=False)
        if stage.balance:
            self._balance(load)
        busiest = float((load.amax(1) / load.mean(1)).max())
        return {"loss": loss_sum, "index_loss": index_sum, "grad_norm": norm, "busiest_expert": busiest}

    @torch.no_grad()
    def _balance(self, load: Tensor) -> None:
        """Move the bias of experts with far too little or too much work; the others keep their character."""
        relative = load / load.mean(1, keepdim=True)
        for layer, shares in zip(self.model.each_layer(), relative, strict=True):
            layer.ffn.gate.bias += BIAS_STEP * ((shares < IDLE).float() - (shares > OVERWORKED).float())

    # -- held-out text ------------------------------------------------------------------------

    @torch.no_grad()
    def held_out(self, context: int, rounding: bool) -> dict[str, float]:
        """Mean loss per token of some held-out rows of each part."""
        self.model.eval()
        fused, Fusion.on = Fusion.on, False  # shapes of their own: not worth compiling for
        losses = {}
        for file in sorted(self.directory.glob("heldout-*.safetensors")):
            documents = read_documents([file])
            pieces = lay_out([len(d) for d in documents], context, self.step_tokens)[:HELD_OUT_ROWS]
            ids, numbers = pack(
                [[documents[d][a:b] for d, a, b in row] for row in pieces], context, self.step_tokens
            )
            following, known = targets(ids, numbers)
            sets = torch.full_like(ids, COMPLETE)
            total = 0.0
            for i in range(len(ids)):
                row = slice(i, i + 1)
                hidden = self._forward(ids[row], numbers[row], sets[row], rounding)
                logits = self.model.head(hidden.states[known[i]])
                wanted = following[i][known[i]]
                total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            losses[file.stem.removeprefix("heldout-")] = total / int(known.sum())
        self.model.train()
        Fusion.on = fused
        return losses

    # -- the whole ----------------------------------------------------------------------------

    def run(self, until_tokens: int) -> None:
        """Train until `until_tokens` have been seen, or a signal asks to stop."""
        progress = self.state.progress
        log = Log(self.directory)
        last_save, mark, marked_tokens = time.monotonic(), time.monotonic(), progress.tokens
        current: tuple[int, int, str] | None = None
        while progress.tokens < until_tokens and not self.stopping:
            number, stage = self.schedule.stage_at(progress.tokens)
            if number != progress.stage or progress.corpus != self.corpus.fingerprint:
                # Another row length or other data: rows are laid out anew, and this pass begins again.
                progress.stage, progress.row, progress.corpus = number, 0, self.corpus.fingerprint
                progress.passes += 1
            if current != (number, progress.passes, progress.corpus):
                self.model.set_rounding(stage.rounding)
                data = Pass.of(self.corpus, stage.context, self.step_tokens, (SEED, progress.passes))
                current = (number, progress.passes, progress.corpus)
            count = stage.batch // stage.context
            if progress.row + count > len(data.rows):
                progress.passes, progress.row = progress.passes + 1, 0
                continue
            batch = data.batch(progress.row, count)
            rate = self.schedule.learning_rate(progress.tokens)
            result = self.step(batch, stage, rate)
            if not math.isfinite(result["loss"]):
                raise SystemExit(
                    f"step {progress.step}: the loss is {result['loss']}; the last save is untouched"
                )
            before = progress.tokens
            progress.row += count
            progress.step += 1
            progress.tokens += batch.ids.numel()
            now = time.monotonic()
            if progress.step % 10 == 0:
                speed = (progress.tokens - marked_tokens) / (now - mark)
                log.step(progress.step, progress.tokens, stage.name, rate, result, speed)
                mark, marked_tokens = now, progress.tokens
            if before // HELD_OUT_EVERY_TOKENS != progress.tokens // HELD_OUT_EVERY_TOKENS:
                log.held_out(progress.tokens, self.held_out(stage.context, stage.rounding))
                mark, marked_tokens = time.monotonic(), progress.tokens
            if now - last_save > SAVE_EVERY_S:
                self.save()
                last_save = time.monotonic()
        self.save()

    def save(self) -> None:
        self.state.save(self.directory / "state.safetensors")

    def stop(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: finish the step at hand, save, leave."""
        self.stopping = True


class Log:
    """Two CSV files that grow: training steps and held-out losses."""

    def __init__(self, directory: Path) -> None:
        self.steps, self.losses = directory / "train.csv", directory / "heldout.csv"

    def _append(self, file: Path, row: dict[str, object]) -> None:
        fresh = not file.exists()
        with file.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)

    def step(
        self, step: int, tokens: int, stage: str, rate: float, result: dict[str, float], speed: float
    ) -> None:
        numbers = {name: f"{value:.4f}" for name, value in result.items()}
        row = {"step": step, "tokens": tokens, "stage": stage, "rate": f"{rate:.6f}", **numbers}
        self._append(self.steps, {**row, "tokens_per_s": f"{speed:.0f}"})

    def held_out(self, tokens: int, losses: dict[str, float]) -> None:
        self._append(
            self.losses, {"tokens": tokens, **{part: f"{loss:.4f}" for part, loss in losses.items()}}
        )


def fast_products() -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware, else float32."""
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if capability.get("avx512_bf16") or capability.get("amx_bf16") else torch.float32


def can_compile() -> bool:
    """Whether a C++ compiler is here, which fused operations need; without one they run one by one."""
    try:
        torch.compile(torch.sin)(torch.zeros(8))
    except Exception as error:  # whatever the tool chain lacks: training is slower, and goes on
        print(f"operations are not fused, training is slower: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=demo_directory(), help="where data and checkpoints lie")
    parser.add_argument("--stages", type=Path, default=HERE / "stages.json")
    parser.add_argument(
        "--begin-with", type=Path, help="an exported checkpoint to go on from, where there is no saved state"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--until-tokens", type=int, help="stop there; default: the end of the schedule")
    parser.add_argument(
        "--products",
        choices=("bfloat16", "float32"),
        help="dtype of matrix products; default: what is fast here",
    )
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    Precision.products = getattr(torch, args.products) if args.products else fast_products()
    Fusion.on = can_compile()
    schedule = Schedule.read(args.stages)
    trainer = Trainer(args.dir, schedule)
    saved = args.dir / "state.safetensors"
    if saved.exists():
        trainer.state.load(saved)
    elif args.begin_with:
        trainer.begin_with(args.begin_with)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, trainer.stop)
    progress = trainer.state.progress
    print(
        f"{progress.tokens:,} of {schedule.total:,} tokens seen; products in {Precision.products}", flush=True
    )
    trainer.run(args.until_tokens or schedule.total)
    print(f"stopped at {trainer.state.progress.tokens:,} tokens, everything saved in {saved}", flush=True)


if __name__ == "__main__":
    main()
