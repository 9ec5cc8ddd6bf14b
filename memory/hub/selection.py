"""Which files of a repository Loci needs: weights in one format, and the small files beside them.

Only safetensors and GGUF count as weights. Pickled weights (.bin, .pt) and code (*.py) are never chosen,
whatever a config says about them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from memory.checkpoint.gguf_files import PART
from memory.checkpoint.safetensors_files import INDEX_NAME, candidates, choose_shards, read_index
from memory.hub.names import HubModel
from quant.errors import CheckpointError, ConfigError

# What Loci reads beside the weights, where a repository has it.
BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tiktoken.model",
)
TOKENIZERS = ("tokenizer.json", "tiktoken.model")
# GGUF files beside models that are none: projectors of vision models, statistics.
_OTHERS = re.compile(r"(.*/)?(mmproj[^/]*|[^/]*imatrix[^/]*)", re.IGNORECASE)
_QUANTIZATION = re.compile(r"(?:UD-)?(?:(?:I?Q|TQ)\d\w*|BF16|F16|F32|MXFP4\w*)", re.IGNORECASE)


def small_files(names: Iterable[str]) -> list[str]:
    """Those of `names` that are read beside the weights, the index of safetensors files among them."""
    present = set(names)
    return [name for name in (*BESIDE, INDEX_NAME) if name in present]


def gguf_models(names: Iterable[str]) -> dict[str, list[str]]:
    """The GGUF models among `names`: the files of each, by the name it has without the numbers of parts."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(".gguf") and not _OTHERS.fullmatch(name):
            part = PART.fullmatch(name)
            found.setdefault(f"{part['stem']}.gguf" if part else name, []).append(name)
    return found


def is_whole(files: list[str]) -> bool:
    """Whether `files` are all parts of a GGUF model."""
    part = PART.fullmatch(files[0])
    return len(files) == (int(part["count"]) if part else 1)


def chosen_gguf(model: HubModel, models: Mapping[str, list[str]]) -> list[str]:
    """The files of the one of the GGUF `models` that `model` means; none where that is no single one."""
    if model.part is None:
        return next(iter(models.values())) if len(models) == 1 else []
    part = model.part.lower()
    for name, files in models.items():
        spelled = [name, *files]
        if part in {text.lower() for text in (*spelled, *(Path(text).name for text in spelled))}:
            return files
    tag = re.compile(rf"(?<![a-z0-9]){re.escape(part)}(?![a-z0-9_])")
    tagged = [files for name, files in models.items() if tag.search(name.lower().removesuffix(".gguf"))]
    return tagged[0] if len(tagged) == 1 else []


def weights_of(model: HubModel, sizes: Mapping[str, int], folder: Path) -> list[str]:
    """The weights that `model` means, of a repository's files (name -> bytes).

    folder has the repository's index, where there is one. Raises ConfigError where there are none that
    Loci reads, or several.
    """
    ggufs = gguf_models(sizes)
    candidate_names = candidates(name for name in sizes if "/" not in name)
    if model.part is None and candidate_names:
        names = _shards(model, folder, candidate_names)
    else:
        names = chosen_gguf(model, ggufs)
        if not names:
            raise ConfigError(_which(model, sizes, ggufs))
        if not is_whole(names):
            raise ConfigError(f"{model}: the repository lacks parts of {names[0]}; choose another file")
    missing = [name for name in names if name not in sizes]
    if missing:
        raise ConfigError(
            f"{model}: the repository lacks {missing[0]}" + (" and others" if len(missing) > 1 else "")
        )
    return names


def _shards(model: HubModel, folder: Path, names: list[str]) -> list[str]:
    problems: list[str] = []
    try:
        index = read_index(folder, problems)
        if problems:
            raise ConfigError(f"{model}: {problems[0]}")
        return sorted(set(index.values())) or choose_shards(str(model), names)
    except CheckpointError as error:
        raise ConfigError(str(error).replace(str(folder), str(model))) from None


def _which(model: HubModel, sizes: Mapping[str, int], ggufs: Mapping[str, list[str]]) -> str:
    """Why no weights were chosen, and what could be asked for."""
    if not ggufs:
        pickled = [name for name in sizes if name.lower().endswith((".bin", ".pt", ".pth", ".ckpt"))]
        has = f"pickled weights ({pickled[0]}), which are never opened" if pickled else "no weights"
        wanted = (
            f"no GGUF file {model.part}, and" if model.part else "neither safetensors nor GGUF files, but"
        )
        return f"{model}: the repository has {wanted} {has}; look for another repository of this model"
    offers = sorted((sum(sizes[file] for file in files), name) for name, files in ggufs.items())
    tags = {name: _tag(name) for name in ggufs}
    shown = ", ".join(
        f"{tags[name] if list(tags.values()).count(tags[name]) == 1 else name} ({nbytes / 1e9:.3g} GB)"
        for nbytes, name in offers
    )
    asked = f"no single GGUF model {model.part}" if model.part else "several GGUF models"
    return (
        f"{model}: the repository has {asked}; choose one, as in {model.repo}:{tags[offers[0][1]]}: {shown}"
    )


def _tag(name: str) -> str:
    found = _QUANTIZATION.findall(name.removesuffix(".gguf"))
    return str(found[-1]) if found else name
