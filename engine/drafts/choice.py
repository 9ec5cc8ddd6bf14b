"""Who drafts: what `--drafts` says."""

from __future__ import annotations

from typing import Literal

from engine.drafts.base import Drafter
from engine.drafts.beside import LoadedSmallModel
from engine.drafts.lookup import LookupDrafter, PredictionDrafter
from engine.drafts.own import Wanted
from engine.families.loader import Loaded
from quant.errors import ConfigError

DraftChoice = Literal["off", "lookup", "mtp", "auto"]


def weights_wanted(choice: DraftChoice) -> Wanted:
    """Whether a model's own weights for drafts are to be read."""
    return "off" if choice == "lookup" else choice


def drafters_of(
    choice: DraftChoice,
    loaded: Loaded,
    slots: int,
    capacity: int,
    beside: LoadedSmallModel | None = None,
) -> list[Drafter]:
    """The drafters of a loaded model, for up to `slots` sequences of up to `capacity` tokens: none; look-ups
    alone; the model's own alone, beside what clients expect; or all. With any but none, also the small model
    `beside` it.

    Raises ConfigError where the model's own are asked for and it has none.
    """
    if choice == "off":
        return []
    weights = loaded.own_drafts if choice != "lookup" else None
    if choice == "mtp" and weights is None:
        raise ConfigError(
            f"--drafts mtp: {loaded.model.info.name} has no draft layers that Loci can use; leave it out, or "
            "use --drafts lookup"
        )
    own: list[Drafter] = [] if weights is None else [weights.drafter(slots, capacity)]
    lookup = [] if choice == "mtp" else [LookupDrafter()]
    small = [] if beside is None else [beside.drafter()]
    return [PredictionDrafter(), *lookup, *own, *small]
