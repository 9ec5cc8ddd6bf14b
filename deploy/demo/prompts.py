"""Documents as the model sees them: the V4.1 prompt form, rendered by the vendor's own library."""

from __future__ import annotations

import tokenizers
from deepseek_recipe import (
    AssistantMessage,
    Conversation,
    DeepseekV41Encoding,
    SpecialToken,
    SystemMessage,
    UserMessage,
)
from tokenizers import decoders, models, pre_tokenizers, trainers

from corpus import Document

PAD = "<｜▁pad▁｜>"
BOS = SpecialToken.Bos.default_str()
EOS = SpecialToken.Eos.default_str()
USER = SpecialToken.User.default_str()
ASSISTANT = SpecialToken.Assistant.default_str()
THINK_END = SpecialToken.ThinkingEnd.default_str()
SPECIAL_TOKENS = [
    BOS,
    EOS,
    PAD,
    *(
        token.default_str()
        for token in (
            SpecialToken.System,
            SpecialToken.User,
            SpecialToken.Assistant,
            SpecialToken.ThinkingStart,
            SpecialToken.ThinkingEnd,
            SpecialToken.Dsml,
            SpecialToken.LatestReminder,
            SpecialToken.Image,
        )
    ),
]
VOCABULARY = 4096
MESSAGES = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
_ENCODING = DeepseekV41Encoding()


def prompt(turns: Document, *, thinking: bool = False) -> str:
    """The text after which the assistant's answer to the last turn follows."""
    messages = [MESSAGES[role](text) for role, text in turns]
    rendered: str = _ENCODING.render_conversation(Conversation(messages, thinking_mode=thinking)).prompt
    return rendered


def render(document: Document, *, thinking: bool = False) -> str:
    """A whole document, closed by the end-of-sentence token.

    With `thinking`, the last answer is given in thinking mode, without a thought: the model is too
    small to think and learns to say so at once.
    """
    if document[0][0] == "text":
        return f"{BOS}{document[0][1]}{EOS}"
    if document[-1][0] == "user":
        # A conversation that the other side left: nothing follows the last thing said.
        return prompt(document).rsplit(SpecialToken.Assistant.default_str(), 1)[0] + EOS
    closing = THINK_END if thinking else ""
    return f"{prompt(document[:-1], thinking=thinking)}{closing}{document[-1][1]}{EOS}"


def plain_text(document: Document) -> str:
    """What is said, without any markup: what the vocabulary is learned from."""
    return "\n".join(text for _, text in document)


def train_tokenizer(documents: list[Document]) -> tokenizers.Tokenizer:
    """A byte-level BPE vocabulary of the documents' text, digits one by one."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(plain_text, documents), trainer)
    return tokenizer
