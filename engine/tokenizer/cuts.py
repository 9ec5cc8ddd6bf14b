r"""How byte-level tokenizers cut text into words before they merge bytes, by `tokenizer.ggml.pre`.

A slightly wrong cut still gives plausible ids, and a model that reads them is merely worse. So each name
stands for what the `tokenizer.json` of its models says: the regular expressions, whether text is normalised
to NFC, and whether a word that is in the vocabulary is one token whatever the merges say (`ignore_merges`).
The names are llama.cpp's (src/llama-vocab.cpp), whose own expressions are approximations in places (`gpt-4o`
there leaves marks, \p{M}, out of words) and which normalises nothing; tests/golden/tokenizers compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # the endings of "it's", "don't", "you're" ...
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # punctuation, line ends, white space

# OpenAI's cl100k, and Qwen's relatives of it with single digits and, later, with marks as parts of words.
CL100K = rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
QWEN35 = (
    rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# OpenAI's o200k: words end where a capital follows a small letter.
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
SLASHED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(upper: str, lower: str, ending: str) -> str:
    """Words of small letters after any number of capitals, or of capitals before any number of small ones."""
    front = r"[^\r\n\p{L}\p{N}]?"
    return f"{front}[{upper}]*[{lower}]+{ending}|{front}[{upper}]+[{lower}]*{ending}"


O200K = rf"{_cased(UPPER, LOWER, ENGLISH + '?')}|\p{{N}}{{1,3}}|{SLASHED_REST}"
TEKKEN = rf"{_cased(UPPER, LOWER, '')}|\p{{N}}|{SLASHED_REST}"
NOT_HAN = r"&&[^\p{Han}]"
KIMI = rf"[\p{{Han}}]+|{_cased(UPPER + NOT_HAN, LOWER + NOT_HAN, ENGLISH + '?')}|\p{{N}}{{1,3}}|{REST}"

# DeepSeek's cut in several passes. Its first models list the letters that have a case by code point.
CASED = (
    "0041-005A 0061-007A 00B5 00C0-00D6 00D8-00F6 00F8-01BA 01BC-01BF 01C4-0293 0295-02AF 0370-0373 0376 "
    "0377 037B-037D 037F 0386 0388-038A 038C 038E-03A1 03A3-03F5 03F7-0481 048A-052F 0531-0556 10A0-10C5 "
    "13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 "
    "1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 "
    "1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D "
    "212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A "
    "10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
CHINESE, KANA = r"\x{4E00}-\x{9FA5}", r"\x{3040}-\x{309F}\x{30A0}-\x{30FF}"
ASIAN = rf"[{CHINESE}\x{{0800}}-\x{{4E00}}\x{{AC00}}-\x{{D7FF}}]+"
PUNCTUATION = r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+"
DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _ranges(codes: str) -> str:
    """Ranges of code points, as the inside of a character class."""
    return "".join("-".join(rf"\x{{{code}}}" for code in part.split("-")) for part in codes.split())


def _split(pattern: str) -> PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


DIGITS = pre_tokenizers.Digits(individual_digits=True)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)  # has GPT-2's expression built in
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@dataclass(frozen=True)
class Cut:
    """One way to cut.

    steps           each cuts what those before it left whole; the last one spells bytes as characters
    is_nfc          text is normalised to NFC first
    ignores_merges  a word that is in the vocabulary is one token, whatever the merges say
    adds_bos        plain prompts begin with BOS where the file does not say (`tokenizer.ggml.add_bos_token`)
    """

    steps: tuple[PreTokenizer, ...]
    is_nfc: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False

    @property
    def pre_tokenizer(self) -> PreTokenizer:
        """For the library."""
        return pre_tokenizers.Sequence(list(self.steps))

    @property
    def normalizer(self) -> Normalizer | None:
        """For the library."""
        return normalizers.NFC() if self.is_nfc else None


def _deepseek_v1(letters: str, punctuation: str, *more: str) -> Cut:
    patterns = (r"[\r\n]", letters, punctuation, *more, ASIAN)
    return Cut((*map(_split, patterns), DIGITS, BYTES))


_LLAMA3 = Cut((_split(CL100K), BYTES), ignores_merges=True, adds_bos=True)
_GLM4 = Cut((_split(CL100K), BYTES), ignores_merges=True)
_O200K = Cut((_split(O200K), BYTES), ignores_merges=True)
_DIGITWISE = Cut((DIGITS, GPT2))

CUTS = {
    "chatglm-bpe": _GLM4,
    "dbrx": Cut((_split(CL100K), BYTES)),
    "deepseek-coder": _deepseek_v1(r"\s?\p{L}+", r"\s?\p{P}+"),
    "deepseek-llm": _deepseek_v1(rf"\s?[{_ranges(CASED)}]+", PUNCTUATION, r"\s+$"),
    "deepseek-v3": Cut((_split(r"\p{N}{1,3}"), _split(f"[{CHINESE}{KANA}]+"), _split(DEEPSEEK_V3), BYTES)),
    "glm4": _GLM4,
    "gpt-2": Cut((GPT2,)),
    "gpt-4o": _O200K,
    "kimi-k2": Cut((_split(KIMI), BYTES), ignores_merges=True),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "llama4": _O200K,
    "minimax-m2": Cut((_split(O200K), BYTES)),
    "olmo": Cut((GPT2,), is_nfc=True),
    "qwen2": Cut((_split(QWEN2), BYTES), is_nfc=True),
    "qwen35": Cut((_split(QWEN35), BYTES), is_nfc=True),
    "refact": _DIGITWISE,
    "smollm": _DIGITWISE,
    "starcoder": _DIGITWISE,
    "tekken": Cut((_split(TEKKEN), BYTES), ignores_merges=True, adds_bos=True),
}
