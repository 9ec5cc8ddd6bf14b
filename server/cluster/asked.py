"""What is sent to a replica, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.engine import EngineStats, PromptProgress
from engine.output import Output
from engine.sampling.params import SamplingParams

DEPLOYMENT = "replica"  # its name in Serve, by which a config file changes it
APPLICATION = "loci"
STATE = "state"  # the key of what it tells Serve


@dataclass(frozen=True)
class Asked:
    """A sequence.

    prompt  `[tokens]` int32
    params  with a seed, unless there is nothing to draw: it is what makes the answer the same anywhere
    blocks  the hashes of the prompt's blocks, by which it finds its replica
    sent    tokens of the answer that a replica had sent before it was lost
    attempt its number in `Affinity`, where it was asked
    """

    prompt: NDArray[np.int32]
    params: SamplingParams
    cache_salt: str
    prediction: tuple[int, ...]
    blocks: tuple[bytes, ...]
    sent: tuple[int, ...] = ()
    attempt: int = 0


# New of a sequence since the last time: outputs, or how far its prompt is.
Answered = list[Output] | PromptProgress


@dataclass(frozen=True)
class ReplicaInfo:
    """A replica: tokens of its longest sequence, and how many it computes together."""

    context: int
    slots: int


@dataclass(frozen=True)
class ReplicaState:
    """What a replica tells every second: the hashes of what its prefix cache holds, and its figures."""

    hashes: bytes
    context: int
    slots: int
    stats: EngineStats
