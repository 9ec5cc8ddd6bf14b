"""Who drafts: what `--drafts` says."""

from __future__ import annotations

from typing import Literal

from engine.drafts.base import Drafter
from engine.drafts.lookup import LookupDrafter, PredictionDrafter
from engine.families.base import Model
from quant.errors import ConfigError

DraftChoice = Literal["off", "lookup", "mtp", "auto"]


def drafters_of(choice: DraftChoice, model: Model) -> list[Drafter]:
    """The drafters of a loaded model: none; look-ups alone; the model's own alone, beside what clients
    expect; or all.

    Raises ConfigError where the model's own are asked for and it has none.
    """
    if choice == "off":
        return []
    own = model.drafters() if choice != "lookup" else []
    if choice == "mtp" and not own:
        raise ConfigError(
            f"--drafts mtp: {model.info.name} has no draft layers that Loci can use; leave it out, or use "
            "--drafts lookup"
        )
    lookup = [] if choice == "mtp" else [LookupDrafter()]
    return [PredictionDrafter(), *lookup, *own]
