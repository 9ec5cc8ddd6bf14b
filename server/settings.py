"""Settings of a server: command-line flags over `LOCI_*` variables over a TOML file over defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from quant.errors import ConfigError
from quant.formats.kv_names import KvChoice
from server.http.logs import LogFormat

SEVERAL = ("served_model_name", "api_key", "allowed_hosts", "cors_origins")
Experts = Literal["mxfp4", "nf4", "int4"]
Products = Literal["exact", "bf16"]
DraftChoice = Literal["off", "lookup", "mtp", "auto"]
Overflow = Literal["cut", "refuse"]
LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(BaseSettings):
    """Everything `loci serve` can be told. A field's description is its help text."""

    model_config = SettingsConfigDict(env_prefix="LOCI_", env_ignore_empty=True, extra="forbid")

    model: str | None = Field(
        None,
        description="Checkpoint directory, GGUF file, ORG/MODEL of the Hugging Face Hub, demo or smollm2. "
        "Default: demo.",
    )
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on; 0.0.0.0 accepts connections from the network, :: also over IPv6.",
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    served_model_name: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Model name that clients use. For several, repeat the flag or separate them with commas: "
        "answers carry the first. What was given as the model always answers too. Default: the name of the "
        "directory or file.",
    )
    any_model: bool = Field(
        False,
        description="Answer to any model name, for clients that send names of their own vendor's models.",
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="Maximum tokens of a sequence, prompt and answer together. Default: the model's context "
        "length, or as much of it as the KV pool holds.",
    )
    kv_budget: str | None = Field(
        None,
        description="Memory for keys and values, e.g. 4GiB: the pool from which sequences take pages as they "
        "grow. Default: a quarter of the memory that weights leave free, or a tenth of all; on GPUs a tenth "
        "of theirs, at most what the longest sequence, or 8192 tokens of each, needs.",
    )
    max_tokens_overflow: Overflow = Field(
        "cut",
        description="What becomes of a max_tokens that does not fit into the context behind the prompt: cut "
        "to what is left, or refuse. /v1/messages always refuses, in words that its clients understand.",
    )
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Maximum sequences computed together; further ones wait in a queue. Default: up to 16, "
        "as many as the KV pool has room for.",
    )
    max_waiting: int = Field(
        256, ge=0, description="Maximum sequences in the queue; further requests get 429."
    )
    prefill_chunk: int | None = Field(
        None,
        ge=1,
        description="Maximum prompt tokens computed per step. Default: as many as pay on this machine, as "
        "`loci plan` says.",
    )
    prefill_step_ms: float = Field(
        250.0,
        gt=0,
        description="Target duration of a step while answers are being generated: prompts are computed in "
        "chunks small enough for it (or for twice the time of a step without prompts, if that is longer). "
        "Larger values process prompts faster.",
    )
    stream_interval_ms: float = Field(
        10.0,
        ge=0,
        le=1000,
        description="Shortest time between two events of a stream: tokens that come faster are sent "
        "together, none of them later than this; the first one and the end of an answer are sent at once. "
        "0 sends tokens as they come.",
    )
    prompt_products: Products = Field(
        "exact",
        description="How prompts are multiplied: exact, or bf16, with activations and weights rounded to "
        "bfloat16: faster on GPUs, and on processors that have AVX-512 with BF16. Answers are decoded "
        "exactly either way.",
    )
    drafts: DraftChoice = Field(
        "auto",
        description="Tokens guessed ahead, which a step computes along with its own where that pays; answers "
        "are the same: off; lookup, what followed before in prompt and answer; mtp, the model's own draft "
        "layers; or auto, whatever promises most (docs/drafts.md).",
    )
    draft_model: str | None = Field(
        None,
        description="A small model with the same tokens, named as `model` is, that guesses ahead too; it is "
        "read into DRAM (docs/drafts.md).",
    )
    draft_tokens: int = Field(
        15, ge=1, le=15, description="Most tokens that are guessed ahead for an answer in a step."
    )
    prefix_cache: str | None = Field(
        None,
        description="Memory for the prefix cache, e.g. 2GiB: prompts that begin like an earlier prompt or "
        "answer skip that part. 0 turns it off. Default: a tenth of the remaining memory.",
    )
    prefix_disk: str | None = Field(
        None,
        description="Disk space for the prefix cache, e.g. 50GiB: states of prompts and answers are written "
        "there too, and found again after a restart. They can be read back as text: keep the directory "
        "private. Default: none.",
    )
    prefix_dir: Path | None = Field(
        None, description="Directory of states on disk. Default: ~/.cache/loci/states."
    )
    aside_disk: str | None = Field(
        None,
        description="Disk space for sequences that are put aside while the KV pool is short, e.g. 20GiB, in "
        "files without a name in --prefix-dir, which are gone when the server ends. Default: none. They are "
        "put aside in the prefix cache's memory; what finds no place is computed again.",
    )
    dram_budget: str | None = Field(
        None,
        description="Memory for weights, e.g. 16GiB; what does not fit is read from disk when needed. "
        "Default: what caches and work space leave of free memory.",
    )
    experts: Experts | None = Field(
        None,
        description="Format for routed experts that are stored in BF16, F16, F32 or FP8: mxfp4, nf4 or int4, "
        "four bits each. They are encoded once, when the model is first loaded, and kept in "
        "~/.cache/loci/experts. Default: as stored.",
    )
    kv_format: KvChoice = Field(
        "auto",
        description="Format of the KV cache: float32 (exact), bf16, fp8, int8, or vendor, what the model's "
        "makers keep (docs/long-context.md). Default: vendor for models that were trained for it, DeepSeek "
        "V4.1, V4 and V3.2, otherwise float32; also float32 for demo.",
    )
    devices: str | None = Field(
        None,
        description="GPUs for weights and KV cache, e.g. cuda:22GiB (using two real ones is untested), or "
        "virtual:24GiB@12.5GB/s: a virtual GPU is host memory with a GPU's size and link speed; none uses "
        "none. Default: the GPUs of this machine that make the model faster, by plan.",
    )
    cluster: str | None = Field(
        None,
        description="Serve the model in parts, or replicas of it, on the machines of a Ray cluster: its "
        "address; auto for the one that runs on this machine, or if there is none, local, which starts one "
        "for this server alone (docs/cluster.md). Default: no cluster.",
    )
    stages: int | None = Field(
        None,
        ge=2,
        le=64,
        description="Parts that a model is cut into with --cluster. Default: one for each machine, at least "
        "two.",
    )
    replicas: int | None = Field(
        None,
        ge=1,
        le=64,
        description="With --cluster, serve this many whole models behind one address instead of one in parts "
        "(docs/cluster.md). Default: none.",
    )
    measured_file: Path | None = Field(
        None,
        description="File for what is measured while the server runs: uses of experts, rates, how far off "
        "the plan was. `loci plan --measured` takes it. Default: none.",
    )
    explain: bool = Field(
        False,
        description="Print the reason of each choice that the plan has made, before the model is loaded.",
    )
    api_key: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="API key that clients must send as a bearer token. For several, repeat the flag or "
        "separate them with commas.",
    )
    api_key_file: Path | None = Field(
        None,
        description="TOML file of named API keys with their limits; reloaded when it changes.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Host name that clients may use (the Host header); * allows any. For several, repeat "
        "the flag or separate them with commas. Default: localhost, 127.0.0.1 and ::1 if only this machine "
        "can reach the server, otherwise any.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origin of web pages that may call the server, e.g. https://chat.example.org; * allows "
        "any. For several, repeat the flag or separate them with commas. Default: none.",
    )
    max_body_bytes: int = Field(8 * 2**20, ge=1024, description="Maximum size of a request body, in bytes.")
    read_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Seconds a client may take to send a request's headers, and again to send its body.",
    )
    write_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Seconds to wait for a client that does not read its answer before its connection is "
        "closed.",
    )
    response_store_bytes: int = Field(
        64 * 2**20,
        ge=0,
        description="Memory for stored responses (/v1/responses), in bytes; 0 stores none.",
    )
    request_timeout_s: float | None = Field(
        None, gt=0, description="Seconds after which a request is cancelled. Default: none."
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="Seconds that running requests get to finish after SIGTERM or Ctrl-C."
    )
    log_level: LogLevel = Field("info", description="Lowest severity to log.")
    log_format: LogFormat = Field("text", description="Format of log lines: text or JSON objects.")

    @field_validator("model", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @field_validator(*SEVERAL, mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
            return value
        values = [text.strip() for several in given for text in several.split(",")]
        return tuple(text for text in values if text)

    @property
    def needs_key(self) -> bool:
        """True where clients must send a key."""
        return bool(self.api_key) or self.api_key_file is not None

    @property
    def host_names(self) -> tuple[str, ...] | None:
        """Names that requests may ask for; None where any will do."""
        if self.allowed_hosts:
            return None if "*" in self.allowed_hosts else self.allowed_hosts
        return ("localhost", "127.0.0.1", "::1", self.host) if self.is_loopback else None

    @property
    def is_loopback(self) -> bool:
        """True where only this machine can reach the server."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def resolve_settings(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Settings from `flags` (None means not given), the environment and the TOML file `config`.

    Raises ConfigError that names each wrong setting and what was expected.
    """
    if config is not None and not config.is_file():
        raise ConfigError(f"{config}: no such file; --config takes a TOML file")

    class Configured(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config)

    try:
        return Configured(**{name: value for name, value in flags.items() if value not in (None, (), [])})
    except ValidationError as error:
        raise ConfigError(_describe(error)) from None
    except (SettingsError, ValueError) as error:
        raise ConfigError(f"{config or 'environment'}: {error}") from None


def _describe(error: ValidationError) -> str:
    problems = []
    for item in error.errors(include_url=False, include_context=False):
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(f"{name}: no such setting; known: {', '.join(sorted(Settings.model_fields))}")
        elif item["loc"][0] == "api_key":
            problems.append(f"{name}: {item['msg']}")
        else:
            problems.append(f"{name}: {item['msg']}, got {item['input']!r}")
    return "settings: " + "; ".join(problems)
