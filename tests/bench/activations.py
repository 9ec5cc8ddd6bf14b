"""What int8 activations do to the golden checkpoints' logits: `python -m tests.bench.activations`."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from engine.families.base import Batch
from engine.families.registry import family_of
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from quant.kernels.cpu.native import NativeKernels
from tests.conftest import golden_path


def main() -> None:
    for name in ("v41-a", "v41-b", "v41-c"):
        checkpoint = open_safetensors(golden_path(name))
        golden = load_file(golden_path(name) / "expected.safetensors")
        ids, greedy = golden["input_ids"].tolist(), golden["greedy_ids"].tolist()
        expected = golden["logits"].double()
        for kernels in (NativeKernels("exact"), NativeKernels("int8")):
            model = family_of(checkpoint).load(checkpoint, kernels, MemoryBudget(1 << 30))
            cache = model.new_cache(1, len(ids) + len(greedy))
            logits = model.forward(Batch.of([(0, 0, ids)], all_logits=True), cache).double()
            found = [int(logits[-1].argmax())]
            while len(found) < len(greedy):
                found.append(int(model.forward(Batch.of([(0, cache.length(0), found[-1:])]), cache).argmax()))
            log_p, log_q = expected.log_softmax(-1), logits.log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            print(
                f"{name} {kernels.activations}: largest difference {(logits - expected).abs().max():.2g}, "
                f"greedy {'the same' if found == greedy else 'differs'}, KL {kl:.2g}"
            )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
