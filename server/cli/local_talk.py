"""Talking to a model that is loaded into this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

from engine.chat.format import ChatPrompt
from engine.chat.output_parser import MessageDelta
from engine.output import FinishReason, Output
from engine.sampling.params import SamplingParams
from quant.errors import LociError, RequestError
from server.cli.talk import ChatMessage, Sampling
from server.serving.service import bring_up, prepare
from server.settings import resolve_settings


class LocalTalk:
    """A model in this process."""

    def __init__(self, path: Path, **settings: object) -> None:
        """Load it; `settings` are those of a server, by name."""
        self._served = bring_up(prepare(resolve_settings({"model": path, "max_num_seqs": 1, **settings})))
        self.name = self._served.name
        self.model = self._served.loaded.model

    @property
    def can_chat(self) -> bool:
        """False for a model without chat template."""
        return self._served.loaded.chat is not None

    def reply(self, messages: Sequence[ChatMessage], sampling: Sampling) -> Iterator[MessageDelta]:
        """The answer to `messages` as it is generated. Raises LociError."""
        if self._served.loaded.chat is None:
            raise RequestError(f"{self.name} has no chat template; use loci run, which continues a text")
        return self._generate(self._served.loaded.chat.render({"messages": list(messages)}), sampling)

    def continue_text(self, text: str, sampling: Sampling) -> Iterator[str]:
        """What the model writes after `text`, as it is generated. Raises LociError."""
        ids = self._served.loaded.tokenizer.encode(text, add_special_tokens=True)
        for output in self._outputs(ids, sampling):
            yield output.text

    def close(self) -> None:
        """Stop the engine."""
        self._served.engine.stop()

    def _generate(self, prompt: ChatPrompt, sampling: Sampling) -> Iterator[MessageDelta]:
        parser = prompt.new_parser()
        if sampling.max_tokens is None:
            max_tokens = self._served.default_max_tokens(prompt.max_tokens, len(prompt.token_ids))
            sampling = replace(sampling, max_tokens=max_tokens)
        for output in self._outputs(prompt.token_ids, sampling, prompt.stop_token_ids):
            yield from parser.push(output.text, output.special_ranges)
        yield from parser.finish()

    def _outputs(
        self, ids: Sequence[int], sampling: Sampling, stop_token_ids: tuple[int, ...] = ()
    ) -> Iterator[Output]:
        inbox: SimpleQueue[Output] = SimpleQueue()
        params = SamplingParams(
            **{**self._served.loaded.sampling, **sampling.given}, stop_token_ids=stop_token_ids
        )
        ticket = self._served.engine.submit(ids, params, inbox.put)
        try:
            is_over = False
            while not is_over:
                output = inbox.get()
                if output.finish_reason is FinishReason.ERROR:
                    raise LociError(output.error or "the engine failed")
                yield output
                is_over = output.finish_reason is not None
        finally:
            self._served.engine.abort(ticket)
