"""What passes between a GPU's program and those who compute experts that it does not hold: other GPUs, and a
thread.

One mailbox a GPU, in page-locked memory that all can read and write. At each hand-over the GPU leaves its
rows' choices, and their inputs where some are missing, sets the hand-over's `posted` word, and waits for an
`answered` word of each answerer; whoever answers fills in the outputs of the choices that are left to it
before setting that. For an answerer to which nothing is left the GPU answers itself. The words are 0 at a
step's beginning, and only ever set in a step, so nobody has to count. Abandoning a mailbox sets all words at
once: all GPUs go on, with numbers that mean nothing, and the step fails instead of hanging.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from quant.errors import FormatError, LociError

logger = logging.getLogger("loci.kernels")

PAUSE_S = 20e-6  # between looks at a word
HOST = "the processor"
MOST_ANSWERERS = 7  # the processor among them: what the count of rows that have arrived has room for


class StalledError(LociError):
    """A hand-over that nobody answered; the step's results mean nothing."""


class Mailbox:
    """Fixed memory for the hand-overs of one GPU's program.

    posted            `[hand_overs]` int32 words
    answered          `[answerers, hand_overs]` int32 words: first the processor's, then those of `others`
    ids, places       `[hand_overs, max_rows * top_k]` int64: a step's choices, -1 in rows that are not alive;
                      and where the GPU holds each; or -1 less the number of the answerer it is left to
    guesses           `[hand_overs, max_rows * top_k]` int64: what a layer's step is expected to need next, or
                      -1
    inputs            `[max_rows, hidden]` float32, of the last hand-over with something missing
    outputs           `[max_rows * top_k, hidden]`: the missing choices', not weighted

    Raises FormatError for more GPUs than there is room for.
    """

    def __init__(
        self,
        hand_overs: int,
        max_rows: int,
        top_k: int,
        hidden: int,
        *,
        pinned: bool,
        others: Sequence[str] = (),
    ) -> None:
        if 1 + len(others) > MOST_ANSWERERS:
            raise FormatError(f"experts of a layer on more than {MOST_ANSWERERS} GPUs")

        def memory(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=pinned)

        self.top_k = top_k
        self.answerers = (HOST, *others)
        self.posted = memory(hand_overs, dtype=torch.int32)
        self.answered = memory(len(self.answerers), hand_overs, dtype=torch.int32)
        self.ids = memory(hand_overs, max_rows * top_k, dtype=torch.int64)
        self.places = memory(hand_overs, max_rows * top_k, dtype=torch.int64)
        self.guesses = memory(hand_overs, max_rows * top_k, dtype=torch.int64)
        self.guesses[:] = -1
        self.inputs = memory(max_rows, hidden, dtype=torch.float32)
        self.outputs = memory(max_rows * top_k, hidden, dtype=torch.float32)
        self.is_abandoned = False
        self._posted, self._answered = self.posted.numpy(), self.answered.numpy()  # the same memory

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        parts = self.posted, self.answered, self.ids, self.places, self.guesses, self.inputs, self.outputs
        return sum(part.nbytes for part in parts)

    def begin(self) -> None:
        """Before a step, while no GPU has anything to do."""
        self.ids[:] = -1  # also of rows that this step does not have
        self._posted[:] = 0
        self._answered[:] = 0
        self.is_abandoned = False

    def abandon(self) -> None:
        """Let all GPUs go on; the step has failed."""
        self.is_abandoned = True
        self._answered[:] = 1
        self._posted[:] = 1

    # ---------------------------------------------------------------------------------- the GPU's side

    def post(self, number: int) -> None:
        """Set the word; what was written before is there."""
        self._posted[number] = 1

    def wait_for_answer(self, number: int) -> None:
        """Return when the hand-over is answered by all, or abandoned."""
        while not self._answered[:, number].all():
            time.sleep(PAUSE_S)

    # ---------------------------------------------------------------------------------- the other side

    def is_posted(self, number: int) -> bool:
        """Whether the GPU has come to a hand-over."""
        return bool(self._posted[number])

    @property
    def posts(self) -> int:
        """Hand-overs that the GPU has come to."""
        return int(self._posted.sum())

    def unanswered(self) -> tuple[int, tuple[str, ...]] | None:
        """The hand-over that the GPU waits at, or is about to, and for whom."""
        missing = (self._posted != 0) & (self._answered == 0)  # [answerers, hand_overs]
        for number in missing.any(axis=0).nonzero()[0][:1].tolist():
            return number, tuple(name for at, name in enumerate(self.answerers) if missing[at, number])
        return None

    def missing(self, number: int, answerer: int = 0) -> torch.Tensor:
        """Pairs of row and choice, row * top_k + choice, that are left to an answerer: `[n]` int64."""
        return ((self.ids[number] >= 0) & (self.places[number] == -1 - answerer)).nonzero().squeeze(1)

    def guess(self, number: int) -> list[int]:
        """What was guessed there, each row's likeliest first."""
        found = self.guesses[number].view(-1, self.top_k).t().flatten()
        return [expert for expert in found.tolist() if expert >= 0]

    def chosen(self, number: int) -> tuple[list[int], list[list[int]]]:
        """All experts that a step's rows have chosen, and those left to each answerer, ascending."""
        ids = self.ids[number]
        left = [ids[self.missing(number, answerer)] for answerer in range(len(self.answerers))]
        return sorted(set(ids[ids >= 0].tolist())), [sorted(set(part.tolist())) for part in left]

    def answer(self, number: int, answerer: int = 0) -> None:
        """Set the word, after outputs were filled in."""
        self._answered[answerer, number] = 1

    # --------------------------------------------------------------------------------------- their words

    def post_word(self, number: int) -> Word:
        """Where the GPU says that it has left something."""
        return Word(self.posted, number, is_wait=False)

    def call_word(self, number: int) -> Word:
        """Where another GPU waits for that."""
        return Word(self.posted, number, is_wait=True)

    def reply_word(self, number: int, answerer: int) -> Word:
        """Where that other GPU answers."""
        return Word(self.answered[answerer], number, is_wait=False)

    def await_words(self, number: int) -> tuple[Word, ...]:
        """Where the GPU waits for all answers."""
        return tuple(Word(words, number, is_wait=True) for words in self.answered)


# Fields of a hand-over's line; rows that have arrived are counted in one of them.
X: tl.constexpr = tl.constexpr(0)
WIDTH: tl.constexpr = tl.constexpr(1)
GUESSES: tl.constexpr = tl.constexpr(2)
ARRIVED: tl.constexpr = tl.constexpr(3)
MAIL_X: tl.constexpr = tl.constexpr(4)
MAIL_IDS: tl.constexpr = tl.constexpr(5)
MAIL_PLACES: tl.constexpr = tl.constexpr(6)
MAIL_GUESSES: tl.constexpr = tl.constexpr(7)
ANSWERED: tl.constexpr = tl.constexpr(8)
ANSWERERS: tl.constexpr = tl.constexpr(9)
STRIDE: tl.constexpr = tl.constexpr(10)  # from one answerer's word to the next
FIELDS = 11
# In ARRIVED, the number of rows; above it, for each answerer, how many of them leave it something.
BITS: tl.constexpr = tl.constexpr(8)
COUNT: tl.constexpr = tl.constexpr(1 << 8)
PARTS: tl.constexpr = tl.constexpr(8)


@triton.jit
def int64s_at(line, FIELD: tl.constexpr):
    """Where a field says that int64 numbers are."""
    return tl.load(line + FIELD).to(tl.pointer_type(tl.int64))


@triton.jit
def leave_row(line, step, row, idents, places, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """A row's choices to a mailbox, and its x if some are missing; by the last row, the word `answered` of
    those to whom no row leaves any. Of idents and places `[BLOCK]`, the first TOP_K."""
    each = tl.arange(0, BLOCK)
    is_own = each < TOP_K
    pair = row * TOP_K + each
    tl.store(int64s_at(line, MAIL_IDS) + pair, idents, mask=is_own)
    tl.store(int64s_at(line, MAIL_PLACES) + pair, places, mask=is_own)
    if tl.load(line + GUESSES) != 0:
        guesses = tl.load(int64s_at(line, GUESSES) + pair, mask=is_own, other=-1)
        tl.store(int64s_at(line, MAIL_GUESSES) + pair, guesses, mask=is_own)
    is_missing = is_own & (idents >= 0) & (places < 0)
    if tl.sum(is_missing.to(tl.int32), axis=0) > 0:
        width = tl.load(line + WIDTH).to(tl.int32)
        x = tl.load(line + X).to(tl.pointer_type(tl.float32)) + row * width
        to = tl.load(line + MAIL_X).to(tl.pointer_type(tl.float32)) + row * width
        for first in range(0, width, BLOCK):
            inside = first + each < width
            tl.store(to + first + each, tl.load(x + first + each, mask=inside, other=0.0), mask=inside)
    alive = tl.maximum(tl.load(step), 1).to(tl.int32)  # the first row speaks for a step of none
    if row < alive:
        answerers = tl.load(line + ANSWERERS)
        own = tl.full([], 1, tl.int64)
        for answerer in range(0, answerers.to(tl.int32)):
            left = tl.sum((is_missing & (places == -1 - answerer)).to(tl.int32), axis=0)
            own += tl.where(left > 0, 1, 0).to(tl.int64) << (BITS * (answerer + 1))
        total = tl.atomic_add(line + ARRIVED, own) + own
        if total % COUNT == alive:
            tl.store(line + ARRIVED, 0)
            which = tl.arange(0, PARTS)
            left_to = (total >> ((which + 1) % PARTS * BITS)) % COUNT
            words = tl.load(line + ANSWERED).to(tl.pointer_type(tl.int32)) + which * tl.load(line + STRIDE)
            tl.store(words, tl.full([PARTS], 1, tl.int32), mask=(which < answerers) & (left_to == 0))


@dataclass(frozen=True)
class Mail:
    """What the rows of a hand-over leave in the mailbox, once their experts are chosen.

    x        `[rows, hidden]`, what experts are to compute
    guesses  `[rows, top_k]`, what a later layer is expected to choose
    """

    box: Mailbox
    number: int
    x: torch.Tensor
    guesses: torch.Tensor | None

    def line(self) -> list[int]:
        """The hand-over's line."""
        box, n = self.box, self.number
        tensors = {
            X: self.x, MAIL_X: box.inputs, MAIL_IDS: box.ids[n], MAIL_PLACES: box.places[n],
            MAIL_GUESSES: box.guesses[n], ANSWERED: box.answered[0, n:],
        }  # fmt: skip
        numbers = [0] * FIELDS
        numbers[WIDTH.value] = self.x.shape[1]
        numbers[GUESSES.value] = 0 if self.guesses is None else self.guesses.data_ptr()
        numbers[ANSWERERS.value], numbers[STRIDE.value] = len(box.answerers), box.answered.stride(0)
        for field, tensor in tensors.items():
            numbers[field.value] = tensor.data_ptr()
        return numbers


@dataclass(frozen=True)
class Word:
    """Where a program sets one of the words `[n]` int32, or waits for it."""

    words: torch.Tensor
    number: int
    is_wait: bool

    def on_stream(self, device: torch.device) -> None:
        """On the current stream of a CUDA device, perhaps into a graph. Only where `has_stream_words`."""
        stream = torch.cuda.current_stream(device).cuda_stream
        address = self.words.data_ptr() + self.number * self.words.itemsize
        if self.is_wait:
            _wait(stream, address)
        else:
            _write(stream, address)

    def on_host(self, device: torch.device) -> None:
        """By the host, between two launches: where the device's stream cannot."""
        words = self.words.numpy()  # the same memory
        if self.is_wait:
            while not words[self.number]:
                time.sleep(PAUSE_S)
            return
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        words[self.number] = 1


def _write(stream: int, address: int) -> None:
    driver = _driver()
    _check(driver.cuStreamWriteValue32(stream, address, 1, 0)[0])


def _wait(stream: int, address: int) -> None:
    driver = _driver()
    at_least = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
    _check(driver.cuStreamWaitValue32(stream, address, 1, int(at_least))[0])


def _driver() -> Any:
    """NVIDIA's bindings of the driver. Raises ImportError."""
    from cuda.bindings import driver

    return driver


def _check(result: Any) -> None:
    if int(result) != 0:
        raise RuntimeError(f"the CUDA driver refused a stream memory operation: {result!r}")


@cache
def has_stream_words(device: torch.device) -> bool:
    """Whether a stream of the device can write and wait for words in page-locked memory; logs why not."""
    if device.type != "cuda":
        return False
    words = torch.zeros(2, dtype=torch.int32, pin_memory=True)
    try:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            _write(stream.cuda_stream, words.data_ptr())
            _wait(stream.cuda_stream, words.data_ptr())
            stream.synchronize()
    except (ImportError, AttributeError, RuntimeError) as error:
        logger.warning(
            "%s: the host meets the GPU in every layer instead of the GPU's stream waiting for words (%s); "
            "`pip install cuda-bindings` for the version of your CUDA", device, error,
        )  # fmt: skip
        return False
    return bool(words[0] == 1)
