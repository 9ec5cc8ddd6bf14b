"""A checkpoint whose routed experts are read in another format than it was released in.

Experts in bfloat16, float or FP8 are encoded to four bits once, into files of their own
(`memory/convert/experts.py`); everything else stays as it is, and what reads checkpoints sees one.
"""

from __future__ import annotations

import logging

from engine.families.decoder.description import Description
from engine.families.decoder.experts import ROLES, DecoderExpertFiles
from engine.families.decoder.names import REENCODED
from engine.families.decoder.stored import StoredMatrices
from engine.families.decoder.tensors import uses
from memory.checkpoint.checkpoint import Checkpoint
from memory.convert.experts import EncodedExperts, folder_of
from quant.errors import ConfigError, FormatError
from quant.formats.four_bit import FourBit
from quant.formats.fp8 import Fp8
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.formats.plain import Plain
from quant.formats.quantization_config import QuantizationConfig
from quant.packed import Format

logger = logging.getLogger("loci.memory")

CHOICES = ("mxfp4", "nf4", "int4")
LEAVE_OUT = "leave --experts out to use them as they are"


class ReencodedCheckpoint(Checkpoint):
    """`source` with `experts` in the place of its own.

    Until `prepare`, its entries say where experts will lie.
    """

    def __init__(self, source: Checkpoint, own_experts: set[str], experts: EncodedExperts) -> None:
        kept = {name: entry for name, entry in source.entries.items() if name not in own_experts}
        super().__init__(
            source.path, source.model_type, source.config, kept | experts.entries, source.problems
        )
        self.source = source
        self._experts = experts

    def prepare(self) -> None:
        """Encode what has not been encoded yet. Raises LociError where that fails."""
        missing = len(self._experts.missing())
        if not missing:
            return
        nbytes = sum(entry.nbytes for entry in self._experts.entries.values())
        logger.warning(  # shown by every command: it may take long
            "encoding routed experts as %s, once: %.1f GB into %s",
            self._experts.format.name, nbytes / 1e9, self._experts.folder,
        )  # fmt: skip
        self._experts.write(_log_progress)


def _log_progress(done: int, layers: int) -> None:
    """A line for every tenth of the layers."""
    if done and 10 * done // layers != 10 * (done - 1) // layers:
        logger.info("%d of %d layers are encoded", done, layers)


def reencoded(description: Description, checkpoint: Checkpoint, experts: str) -> ReencodedCheckpoint:
    """`checkpoint`, which has been checked, with its routed experts in the format of that name, in CHOICES.

    Raises ConfigError for a model without routed experts, for experts that have four bits already, and for
    shapes that the format cannot hold.
    """
    target = target_format(experts, QuantizationConfig.parse(checkpoint.config))
    check_has_experts(experts, description, str(checkpoint.path))
    files = DecoderExpertFiles.of(description, checkpoint)
    found = {form.name: form for layer in range(files.layers) for form in files.formats(layer)}
    check_target(experts, target, list(found.values()), (files.hidden, files.width))
    stored = StoredMatrices(checkpoint)
    own = {
        name
        for use in uses(description)
        if use.part == "experts" and use.is_matrix
        for name in stored.specs(use)
    }

    def name_of(layer: int, expert: int, number: int) -> str:
        name = REENCODED[ROLES[number]].format(layer=description.expert_layers[layer], expert=expert)
        return name.removesuffix(".weight")

    folder = folder_of(checkpoint.name, files, target)
    return ReencodedCheckpoint(checkpoint, own, EncodedExperts(files, target, name_of, folder))


def target_format(experts: str, config: QuantizationConfig) -> FourBit:
    """The format called `experts`; INT4 in groups of the width that is read with this config."""
    return {"mxfp4": MXFP4, "nf4": NF4, "int4": config.int4}[experts]


def check_has_experts(experts: str, description: Description, name: str) -> None:
    """Raise ConfigError for a model without routed experts."""
    if description.experts is None:
        raise ConfigError(f"--experts {experts}: {name} has no routed experts; leave it out")


def check_target(experts: str, target: FourBit, found: list[Format], columns: tuple[int, ...]) -> None:
    """Raise ConfigError where experts in the formats `found`, with rows of `columns`, cannot be encoded."""
    packed = sorted(form.name for form in found if not isinstance(form, Plain | Fp8))
    if packed:
        raise ConfigError(
            f"--experts {experts}: the routed experts are {', '.join(packed)} already; only BF16, F16, F32 "
            f"and FP8 are encoded again, so that nothing is rounded twice; {LEAVE_OUT}"
        )
    for cols in columns:
        try:
            target.expect_whole_blocks(cols)
        except FormatError:
            raise ConfigError(
                f"--experts {experts}: experts have rows of {cols} columns, which are not whole blocks of "
                f"{target.tile_cols}; choose another format, or {LEAVE_OUT}"
            ) from None
