# ruff: noqa: E402 -- the repository root must be importable before its packages are
"""Train draft stages on the finished model, which stays as it is.

    python deploy/demo/answers.py         # what they learn from, once
    python deploy/demo/train_stages.py    # continues where it stopped

Each token that the model itself has chosen is a target; a stage's block behind each place drafts the next
five. Losses of later places count less: they matter only where the earlier ones were right. The confidence
head learns which drafts were right, and nothing else feels its loss.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import answers
from engine.embedded import DEMO_NAME
from engine.families.deepseek_v41.config import parse_config
from engine.layers.engram_hash import build_token_map
from layers import Fusion, Precision
from measure import Subject, plain
from model import Model
from optimisers import WEIGHT_DECAY, Muon
from packing import alignment, lay_out, pack
from paths import demo_directory
from released import from_released, read_files
from rows import RowFinder
from stages import Anchors, Stages
from train import can_compile, fast_products

CONTEXT, ROWS = 256, 8
PEAK, WARMUP_STEPS = 0.004, 60
CLIP = 1.0
LATER = 0.85  # the weight of a place relative to the one before it
MOST_ANCHORS = 512  # of a step
SAVE_EVERY_S, LOG_EVERY = 180, 20
SEED = 11
MOST = {"train": 20_000, "heldout": 150}  # conversations whose captures are kept in memory


class Captures:
    """The frozen model, and what it captures: the mean over streams of its target layers' inputs."""

    def __init__(self, subject: Subject, targets: tuple[int, ...]) -> None:
        self.subject, self._found = subject, dict[int, Tensor]()
        self._targets = targets
        for number, layer in enumerate(subject.model.each_layer()):
            if number in targets:
                layer.hc_attn.register_forward_pre_hook(
                    lambda _, inputs, number=number: self._found.__setitem__(number, inputs[0].mean(0))
                )

    @torch.no_grad()
    def of(self, ids: Tensor, documents: Tensor) -> Tensor:
        """`[B, T, targets * hidden]`."""
        self.subject.hidden(ids, documents, plain)
        return torch.cat([self._found[n] for n in self._targets], dim=1).view(*ids.shape, -1)


class Packed(NamedTuple):
    """Rows of conversations: ids, documents and which tokens the model chose, `[rows, context]`, and what it
    captured, `[rows, context, targets * hidden]` bfloat16."""

    ids: Tensor
    documents: Tensor
    chosen: Tensor
    captures: Tensor


class Trainer:
    """Stages, optimisers, and how far they have come."""

    def __init__(
        self, directory: Path, model_files: Path, minutes: float, parts: Sequence[str] = ("heldout", "train")
    ) -> None:
        self.directory, self.minutes = directory, minutes
        config = parse_config(json.loads((model_files / "config.json").read_text()))
        tokenizer = tokenizers.Tokenizer.from_file(str(model_files / "tokenizer.json"))
        self.model = Model(config)
        tables = from_released(self.model, read_files(model_files))
        self.model.eval().requires_grad_(False)
        torch.manual_seed(SEED)
        self.stages = Stages(config)
        self._begin_as_last_layer()
        self.stages.set_rounding(True)
        find_rows = RowFinder(config, build_token_map(tokenizer, config.vocab_size))
        self.captures = Captures(Subject(self.model, tables, find_rows), self.stages.shape.target_layer_ids)
        self.optimisers = self._optimisers()
        self.step_tokens = alignment(config)
        self.steps, self.seconds, self.anchors = 0, 0.0, 0
        self.stopping = False
        self.data: dict[str, Packed] = {}
        for which in parts:
            self.read(which)
            print(f"{which}: {int(self.data[which].chosen.sum()):,} chosen tokens", flush=True)

    @torch.no_grad()
    def _begin_as_last_layer(self) -> None:
        """Stages begin as copies of the model's last layer, with the experts that come first in it, and read
        what was captured of its input: far better than nothing."""
        last = list(self.model.each_layer())[-1]
        theirs = last.state_dict()
        for stage in self.stages.each_stage():
            for name, value in stage.state_dict().items():
                value.copy_(theirs[name][: len(value)])
        c = self.stages.config
        self.stages.main_proj.weight.zero_()
        self.stages.main_proj.weight[:, -c.hidden_size :] = torch.eye(c.hidden_size)
        self.stages.main_norm.weight.copy_(last.attn_norm.weight)
        self.stages.norm.weight.copy_(self.model.norm.weight)

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        splits: dict[torch.nn.Parameter, int] = {}
        for name, parameter in self.stages.named_parameters():
            is_small = parameter.dim() < 2 or min(parameter.shape[-2:]) < 32 or name.startswith("markov_head")
            (others if is_small else matrices).append(parameter)
            if name.endswith("experts_w13"):
                splits[parameter] = 2
        adam = torch.optim.AdamW(
            [{"params": others, "weight_decay": WEIGHT_DECAY * 0.1}], lr=0.0, betas=(0.9, 0.95), fused=True
        )
        return [Muon(matrices, splits, Precision.products), adam]

    # -- what is learned ----------------------------------------------------------------------

    def read(self, which: str) -> None:
        """Pack the answers and compute what the model captures of them, once."""
        found = answers.read(self.directory / f"answers-{which}.safetensors")[: MOST[which]]
        rows = lay_out([len(ids) for ids, _ in found], CONTEXT, self.step_tokens)
        kept: list[Packed] = []
        for first in range(0, len(rows), ROWS):
            part = rows[first : first + ROWS]
            ids, documents = self._packed([[found[d][0][a:b] for d, a, b in row] for row in part])
            chosen, _ = self._packed([[found[d][1][a:b].long() for d, a, b in row] for row in part])
            captures = self.captures.of(ids, documents).to(torch.bfloat16)
            kept.append(Packed(ids, documents, chosen.bool(), captures))
        self.data[which] = Packed(*map(torch.cat, zip(*kept, strict=True)))

    def _packed(self, rows: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        return pack([[piece.numpy() for piece in row] for row in rows], CONTEXT, self.step_tokens)

    def batches(self, which: str, seed: int) -> list[Packed]:
        """The rows in another order, `ROWS` at a time."""
        data = self.data[which]
        order = torch.randperm(len(data.ids), generator=torch.Generator().manual_seed(seed))
        return [Packed(*(part[rows] for part in data)) for rows in torch.split(order, ROWS)]

    def blocks(
        self, ids: Tensor, documents: Tensor, chosen: Tensor, most: int
    ) -> tuple[Anchors, Tensor, Tensor]:
        """Some places to draft behind; the tokens to be drafted `[n, block]`, and which of them are known."""
        block = self.stages.shape.block_size
        padded = F.pad(chosen, (0, block + 1))
        numbers = F.pad(documents, (0, block + 1), value=-1)
        # Behind place p stands the newest token, and behind that the first drafted one.
        usable = padded[:, 2 : CONTEXT + 2] & (numbers[:, 2 : CONTEXT + 2] == documents) & (documents >= 0)
        row, place = usable.nonzero(as_tuple=True)
        some = torch.randperm(len(row))[:most]
        anchors = Anchors(row[some], place[some])
        at = anchors.place.unsqueeze(1) + 2 + torch.arange(block)
        wanted = F.pad(ids, (0, block + 1))[anchors.row.unsqueeze(1), at]
        is_chosen = padded[anchors.row.unsqueeze(1), at]
        same = numbers[anchors.row.unsqueeze(1), at] == documents[anchors.row, anchors.place].unsqueeze(1)
        return anchors, wanted, (is_chosen & same).long().cumprod(1).bool()

    def step(self, batch: Packed, rate: float) -> dict[str, float]:
        """One update from some blocks of packed rows."""
        ids, documents, chosen, captures = batch
        anchors, wanted, known = self.blocks(ids, documents, chosen, MOST_ANCHORS)
        drafted = self.stages(self.model, captures.float(), ids, documents, anchors)
        weights = known * LATER ** torch.arange(wanted.shape[1])
        losses = F.cross_entropy(drafted.logits.flatten(0, 1), wanted.flatten(), reduction="none")
        loss = (losses.view_as(weights) * weights).sum() / weights.sum()
        right = (drafted.logits.detach().argmax(-1) == wanted).float()
        sure = F.binary_cross_entropy_with_logits(drafted.confidence, right, reduction="none")
        torch.autograd.backward(loss + 0.1 * (sure * known).sum() / known.sum())
        torch.nn.utils.clip_grad_norm_(self.stages.parameters(), CLIP)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=False)
        self.anchors += len(anchors.row)
        return {"loss": float(loss.detach()), "right": float((right * known).sum() / known.sum())}

    @torch.no_grad()
    def held_out(self, most_batches: int = 1000) -> tuple[float, list[float]]:
        """Mean number of accepted drafts of a block, and the chance of each place, those before accepted."""
        reached = torch.zeros(self.stages.shape.block_size)
        accepted = torch.zeros_like(reached)
        torch.manual_seed(SEED)
        blocks = 0
        for ids, documents, chosen, captures in self.batches("heldout", SEED)[:most_batches]:
            anchors, wanted, known = self.blocks(ids, documents, chosen, MOST_ANCHORS)
            drafted = self.stages(self.model, captures.float(), ids, documents, anchors)
            tokens = self.stages.chain(self.model, drafted, ids[anchors.row, anchors.place + 1])
            right = ((tokens == wanted) & known).long().cumprod(1).float()
            before = F.pad(right, (1, 0), value=1.0)[:, :-1]
            reached += (before * known).sum(0)
            accepted += right.sum(0)
            blocks += len(right)
        return float(accepted.sum() / blocks), (accepted / reached.clamp(min=1)).tolist()

    # -- the whole ----------------------------------------------------------------------------

    def rate(self) -> float:
        """Warm-up, stable, and a decay over the last half of the time."""
        share = min(1.0, self.seconds / (60 * self.minutes))
        return PEAK * min(1.0, (self.steps + 1) / WARMUP_STEPS) * min(1.0, 2 * (1 - share) + 0.01)

    def run(self) -> None:
        """Train until the time is over, or a signal asks to stop."""
        passes, last_save = 0, time.monotonic()
        while self.seconds < 60 * self.minutes and not self.stopping:
            passes += 1
            for batch in self.batches("train", self.steps + passes):
                began, rate = time.process_time(), self.rate()
                result = self.step(batch, rate)
                if not math.isfinite(result["loss"]):
                    raise SystemExit(f"step {self.steps}: the loss is {result['loss']}")
                self.steps += 1
                self.seconds += time.process_time() - began
                if self.steps % LOG_EVERY == 0:
                    print(
                        f"step {self.steps} {self.seconds:.0f} s rate {rate:.5f} loss {result['loss']:.3f} "
                        f"right {result['right']:.3f}",
                        flush=True,
                    )
                if time.monotonic() - last_save > SAVE_EVERY_S:
                    self.save()
                    last_save = time.monotonic()
                if self.stopping or self.seconds >= 60 * self.minutes:
                    break
        self.save()

    def save(self) -> None:
        """Write everything to a temporary name, then rename; and say how good it is."""
        mean, chances = self.held_out(6)
        print(
            f"step {self.steps}: {mean:.2f} drafts accepted; by place "
            + " ".join(f"{chance:.2f}" for chance in chances),
            flush=True,
        )
        tensors = {f"model.{name}": value for name, value in self.stages.state_dict().items()}
        names = {id(parameter): name for name, parameter in self.stages.named_parameters()}
        for optimiser in self.optimisers:
            for parameter, moments in optimiser.state.items():
                tensors |= {f"{kind}.{names[id(parameter)]}": value for kind, value in moments.items()}
        progress = {"steps": self.steps, "seconds": self.seconds, "anchors": self.anchors}
        file = self.directory / "stages.safetensors"
        temporary = file.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"progress": json.dumps(progress)})
        temporary.replace(file)

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Take over what `save` wrote."""
        with safe_open(file, framework="pt") as stored:
            vars(self).update(json.loads(stored.metadata()["progress"]))
            known = set(stored.keys())
            for name, value in self.stages.state_dict().items():
                value.copy_(stored.get_tensor(f"model.{name}"))
            names = {id(parameter): name for name, parameter in self.stages.named_parameters()}
            for optimiser in self.optimisers:
                for parameter in (p for group in optimiser.param_groups for p in group["params"]):
                    kinds = ("step", "exp_avg", "exp_avg_sq", "momentum")
                    found = {kind: f"{kind}.{names[id(parameter)]}" for kind in kinds}
                    optimiser.state[parameter] = {
                        kind: stored.get_tensor(name) for kind, name in found.items() if name in known
                    }

    def stop(self, signum: int, frame: object) -> None:
        """Signal handler: finish the step at hand, save, leave."""
        self.stopping = True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=demo_directory(), help="where answers and states lie")
    parser.add_argument("--model", type=Path, default=HERE / DEMO_NAME)
    parser.add_argument("--minutes", type=float, default=60, help="of training, all runs together")
    parser.add_argument("--fused", action="store_true", help="compile chains of operations first: minutes")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    Precision.products = fast_products()
    Fusion.on = args.fused and can_compile()
    trainer = Trainer(args.dir, args.model, args.minutes)
    saved = args.dir / "stages.safetensors"
    if saved.exists():
        trainer.load(saved)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, trainer.stop)
    trainer.run()


if __name__ == "__main__":
    main()
