"""`loci pull`, `loci list`, `loci rm`, and what other commands do with a model of the Hub."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from huggingface_hub import constants

from memory.hub import stand_in
from memory.hub.names import HubModel
from quant.errors import ConfigError
from server.cli import fetch
from server.cli.arguments import complete_model
from tests.engine.families.tiny_llama import tiny_values, write_gguf
from tests.hub import Hub, Repository, files_of
from tests.server import harness
from tests.server.conftest import StartServer
from tests.server.harness import TINY, eventually, invoke
from tests.server.serving.test_linked_models import VOCABULARY

RUN = ("Hello", "--max-tokens", "4", "--temperature", "0")
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def tiny(hub: Hub) -> Repository:
    """org/tiny, a V4.1."""
    return hub.add("org/tiny", files_of(TINY) | {"pytorch_model.bin": b"pickle", "modeling.py": b"code"})


@pytest.fixture
def ggufs(hub: Hub, tmp_path: Path) -> Repository:
    """org/tiny-GGUF, a Llama in two quantizations."""
    files = {
        f"tiny-{kind}.gguf": write_gguf(tmp_path / kind, tiny_values(), kind, VOCABULARY).read_bytes()
        for kind in ("F32", "Q8_0")
    }
    return hub.add("org/tiny-GGUF", files)


def complaint(*arguments: str) -> str:
    result = invoke(*arguments)
    assert (result.returncode, result.stdout) == (1, "")
    return harness.complaint(result.stderr)


@pytest.mark.slow
def test_a_model_is_downloaded_served_and_not_asked_for_again(
    hub: Hub, tiny: Repository, start_server: StartServer
) -> None:
    first = start_server("org/tiny").await_ready()
    listed = httpx.get(f"{first.url}/v1/models").json()["data"]
    question = {"model": "org/tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    answer = httpx.post(f"{first.url}/v1/chat/completions", json=question)

    assert [model["id"] for model in listed] == ["org/tiny"]
    assert httpx.get(f"{first.url}/v1/models/org/tiny").status_code == 200
    assert answer.status_code == 200
    assert sorted(hub.fetched())[-1] == "tokenizer.json"
    assert {path.split("/")[1] for _, path, _ in hub.requests} == {"api", "org"}
    assert {path.split("/")[2] for _, path, _ in hub.requests if path.startswith("/api/")} == {"models"}

    first.kill()
    hub.requests.clear()
    start_server("org/tiny").await_ready()
    assert hub.requests == []


def test_run_answers_as_the_local_model_does_and_says_on_stderr_what_it_fetched(tiny: Repository) -> None:
    first, again, local = (
        invoke("run", "org/tiny", *RUN),
        invoke("run", "org/tiny", *RUN),
        invoke("run", TINY, *RUN),
    )

    assert first.stdout == again.stdout == local.stdout
    assert first.stderr.startswith("Downloading org/tiny: 2.18 MB\n")
    assert first.stderr.endswith("org/tiny: 100 %\n")
    assert again.stderr == ""


def test_a_directory_of_that_name_wins(
    hub: Hub, tiny: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, tmp_path / "org" / "tiny")

    assert invoke("run", "org/tiny", *RUN).returncode == 0
    assert hub.requests == []


@pytest.mark.parametrize("command", ["info", "plan"])
def test_a_model_is_described_before_it_is_downloaded(hub: Hub, tiny: Repository, command: str) -> None:
    result, local = invoke(command, "org/tiny"), invoke(command, TINY)

    assert (result.returncode, result.stderr) == (0, "")
    named = local.stdout.replace("v41-c", "org/tiny")
    assert result.stdout.splitlines()[:1] == named.splitlines()[:1]
    assert hub.fetched() == []
    if command == "info":
        assert result.stdout.endswith("Not on this machine; `loci pull org/tiny` downloads it.\n")


def test_commands_that_need_weights_say_how_to_get_them(hub: Hub, tiny: Repository, tmp_path: Path) -> None:
    said = complaint("logits", "org/tiny", "--ids-file", "ids.json", "--out", str(tmp_path / "out"))

    assert "`loci pull org/tiny` downloads it" in said
    assert hub.requests == []


def test_a_large_download_is_planned_and_not_begun_unasked(
    hub: Hub, tiny: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "ASKED_BYTES", 1_000_000)

    said = invoke("run", "org/tiny", *RUN)

    assert (said.returncode, said.stdout) == (1, "")
    assert re.search(
        r"^org/tiny \(\w{8}\): 5 files, 2.18 MB to download; \S+ [GT]B are free in \S+$", said.stderr, re.M
    )
    assert "org/tiny on this: fits" in said.stderr
    assert "Expected tokens per second" in said.stderr
    assert said.stderr.endswith(
        "loci: org/tiny is not here, and downloading 2.18 MB is not begun unasked; pass --yes, or run "
        "`loci pull org/tiny` in a terminal\n"
    )
    assert hub.fetched() == []
    assert invoke("pull", "org/tiny", "--yes").returncode == 0
    assert SHARD in hub.fetched()


class Terminal(io.StringIO):
    """What a person types, or sees."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("typed", "is_wanted"), [("y\n", True), ("\n", False), ("no\n", False), ("", False)])
def test_a_person_is_asked_about_a_large_download(
    hub: Hub, tiny: Repository, monkeypatch: pytest.MonkeyPatch, typed: str, is_wanted: bool
) -> None:
    monkeypatch.setattr(fetch, "ASKED_BYTES", 1_000_000)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    monkeypatch.setattr(sys, "stderr", Terminal())

    if is_wanted:
        assert fetch.pulled(HubModel("org/tiny"), yes=False)[1]
    else:
        with pytest.raises(ConfigError, match="org/tiny was not downloaded"):
            fetch.pulled(HubModel("org/tiny"), yes=False)

    assert isinstance(sys.stderr, Terminal)
    assert "Download 2.18 MB? [y/N] " in sys.stderr.getvalue()
    assert bool(hub.fetched()) is is_wanted


def test_what_loci_cannot_run_is_not_downloaded(hub: Hub) -> None:
    hub.add("org/other", files_of(TINY) | {"config.json": b'{"model_type": "mamba"}'})

    said = complaint("pull", "org/other", "--yes")

    assert said.startswith("loci: org/other: model type 'mamba' is not supported; known: ")
    assert said.endswith("\nNothing was downloaded.\n")
    assert hub.fetched() == []


def test_what_is_wrong_with_a_models_tensors_is_known_before(hub: Hub) -> None:
    files = files_of(TINY)
    config = json.loads(files["config.json"])
    config["text_config"]["hidden_size"] = 256
    hub.add("org/broken", files | {"config.json": json.dumps(config).encode()})

    assert "head.weight: shape [1024, 128], expected [1024, 256]" in complaint("pull", "org/broken", "--yes")
    assert hub.fetched() == []


def test_one_gguf_file_is_fetched_by_its_quantization(hub: Hub, ggufs: Repository, tmp_path: Path) -> None:
    result = invoke("run", "org/tiny-GGUF:q8_0", "abcab", "--max-tokens", "4", "--temperature", "0")

    assert result.returncode == 0, result.stderr
    assert hub.fetched() == ["tiny-Q8_0.gguf"]
    local = invoke("run", tmp_path / "Q8_0", "abcab", "--max-tokens", "4", "--temperature", "0")
    assert result.stdout == local.stdout
    hub.requests.clear()
    again = invoke("run", "org/tiny-GGUF", "abcab", "--max-tokens", "4", "--temperature", "0")
    assert again.stdout == local.stdout  # the only one that is here
    assert hub.requests == []


def test_a_gguf_model_in_parts_arrives_with_all_of_them(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    write_gguf(folder / "tiny-Q8_0.gguf", tiny_values(), "Q8_0", VOCABULARY, max_tensors=8)
    parts = {f"Q8_0/{name}": content for name, content in files_of(folder).items()}
    hub.add("org/parts", parts | {"tiny-F32.gguf": b"not asked for"})

    result = invoke("run", "org/parts:Q8_0", "abcab", "--max-tokens", "4", "--temperature", "0")

    assert result.returncode == 0, result.stderr
    assert len(parts) > 1
    assert sorted(hub.fetched()) == sorted(files_of(folder))
    local = invoke("run", min(folder.iterdir()), "abcab", "--max-tokens", "4", "--temperature", "0")
    assert result.stdout == local.stdout
    assert [model["name"] for model in json.loads(invoke("list", "--json").stdout)] == [
        "org/parts:Q8_0/tiny-Q8_0.gguf"
    ]


@pytest.mark.parametrize("part", ["", ":Q4_K_M"])
def test_a_wrong_quantization_is_answered_with_those_there_are(ggufs: Repository, part: str) -> None:
    said = complaint("run", f"org/tiny-GGUF{part}", *RUN)

    assert re.search(r"choose one, as in org/tiny-GGUF:Q8_0: Q8_0 \(\S+ GB\), F32 \(\S+ GB\)\n$", said)


def test_headers_longer_than_expected_are_read_to_their_end(
    hub: Hub, ggufs: Repository, tiny: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "FIRST_BYTES", 100)
    monkeypatch.setattr(stand_in, "FIRST_GGUF_BYTES", 100)

    for model in ("org/tiny", "org/tiny-GGUF:F32"):
        result = invoke("info", model)
        assert result.returncode == 0, result.stderr
    assert hub.fetched() == []


def test_offline_a_whole_model_is_used_and_one_in_part_refused(
    hub: Hub, tiny: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = fetch.pulled(HubModel("org/tiny"), yes=True)[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()

    assert invoke("run", "org/tiny", *RUN).returncode == 0
    (snapshot / SHARD).unlink()
    assert "org/tiny is not (or not whole) in" in complaint("run", "org/tiny", *RUN)
    assert "HF_HUB_OFFLINE forbids downloading it" in complaint("pull", "org/tiny")
    assert hub.requests == []


def test_pull_brings_a_model_up_to_date(hub: Hub, tiny: Repository) -> None:
    first, same = invoke("pull", "org/tiny"), invoke("pull", "org/tiny")
    new = tiny.commit(files_of(TINY) | {"generation_config.json": b'{"temperature": 0.5}'})
    hub.requests.clear()
    updated = invoke("pull", "org/tiny")

    assert first.stdout.startswith("org/tiny is here now: ")
    assert same.stdout.startswith("org/tiny is up to date: ")
    assert updated.stdout.startswith("org/tiny is here now: ")
    assert updated.stdout.endswith(f"{new}\nServe it: loci serve org/tiny\n")
    assert hub.fetched() == ["generation_config.json"]


def test_names_that_are_none_are_said_to_be(hub: Hub) -> None:
    for name in ("tiny", "./org/tiny", "https://example.org/org/tiny"):
        for command in ("pull", "rm"):
            assert complaint(command, name).startswith(f"loci: {name}: not the name of a model on the Hub")
    assert hub.requests == []


def test_list_shows_what_is_here(hub: Hub, tiny: Repository, ggufs: Repository) -> None:
    assert invoke("list").stdout.startswith("No models are in ")
    invoke("pull", "org/tiny")
    invoke("pull", "org/tiny-GGUF:F32")
    old = tiny.main
    tiny.commit(files_of(TINY) | {"generation_config.json": b"{}"})
    invoke("pull", "org/tiny")

    shown = invoke("list").stdout
    models = {model["name"]: model for model in json.loads(invoke("list", "--json").stdout)}

    assert set(models) == {"org/tiny", f"org/tiny@{old}", "org/tiny-GGUF:tiny-F32.gguf"}
    assert models["org/tiny"]["model_type"] == "deepseek_v41"
    assert models["org/tiny"]["revision"] == f"main {tiny.main[:8]}"
    assert models["org/tiny-GGUF:tiny-F32.gguf"]["model_type"] == "llama"
    assert all(model["is_whole"] and model["runs"] for model in models.values())
    assert re.search(r"^org/tiny +2.18 MB  main \w{8} +\d{4}-\d\d-\d\d  deepseek_v41  yes$", shown, re.M)
    for name in models:
        assert invoke("run", name, *RUN).returncode == 0


def test_looking_at_models_does_not_count_as_using_them(hub: Hub, ggufs: Repository) -> None:
    path = fetch.pulled(HubModel("org/tiny-GGUF", part="F32"), yes=True)[0]
    os.utime(path, (1_000_000_000, 1_000_000_000))

    for _ in range(2):
        (model,) = json.loads(invoke("list", "--json").stdout)
        assert model["last_used"] == 1_000_000_000


def test_rm_removes_that_and_nothing_else(hub: Hub, tiny: Repository, ggufs: Repository) -> None:
    for name in ("org/tiny", "org/tiny-GGUF:F32", "org/tiny-GGUF:Q8_0"):
        assert invoke("pull", name).returncode == 0

    def names() -> list[str]:
        return [model["name"] for model in json.loads(invoke("list", "--json").stdout)]

    assert "is not removed unasked; pass --yes" in complaint("rm", "org/tiny")
    assert "org/tiny:F32 is not in" in complaint("rm", "org/tiny:F32", "--yes")
    assert invoke("rm", "org/tiny-GGUF:F32", "--yes").stdout.startswith("Removed org/tiny-GGUF:F32, ")
    assert names() == ["org/tiny", "org/tiny-GGUF:tiny-Q8_0.gguf"]
    assert invoke("rm", "org/tiny", "--yes").returncode == 0
    assert names() == ["org/tiny-GGUF:tiny-Q8_0.gguf"]
    assert invoke("rm", "org/tiny-GGUF:Q8_0", "--yes").returncode == 0
    assert names() == []
    assert "org/tiny is not in" in complaint("rm", "org/tiny", "--yes")
    assert not list(Path(constants.HF_HUB_CACHE).glob("models--*"))


def test_a_revision_is_removed_alone(hub: Hub, tiny: Repository) -> None:
    old = tiny.main
    invoke("pull", "org/tiny")
    tiny.commit(files_of(TINY) | {"generation_config.json": b"{}"})
    invoke("pull", "org/tiny")

    assert invoke("rm", f"org/tiny@{old}", "--yes").returncode == 0

    assert [model["name"] for model in json.loads(invoke("list", "--json").stdout)] == ["org/tiny"]
    assert invoke("run", "org/tiny", *RUN).returncode == 0


def test_a_shell_completes_paths_and_models_that_are_here(
    hub: Hub, tiny: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invoke("pull", "org/tiny")
    hub.requests.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "one").mkdir(parents=True)
    (tmp_path / "models" / "two.gguf").touch()
    (tmp_path / "models" / "three.txt").touch()

    assert complete_model("o") == ["org/tiny"]
    assert complete_model("d") == ["demo"]
    assert complete_model("models/") == ["models/one", "models/two.gguf"]
    assert complete_model("org/tiny") == ["org/tiny"]
    assert f"{tmp_path}/models" in complete_model(f"{tmp_path}/mo")
    assert hub.requests == []


@pytest.mark.slow
def test_a_download_ends_with_ctrl_c_and_leaves_nothing_half_written(hub: Hub, tiny: Repository) -> None:
    tiny.stalls[SHARD] = 500_000
    process = subprocess.Popen(
        harness.command("pull", "org/tiny"), env=harness.environment(), stderr=subprocess.PIPE, text=True
    )
    blobs = Path(constants.HF_HUB_CACHE) / "models--org--tiny" / "blobs"
    eventually(lambda: SHARD in hub.fetched(), "the shard is asked for")
    eventually(
        lambda: len([file for file in blobs.iterdir() if file.suffix != ".incomplete"]) == 4,
        "the rest is here",
    )
    assert list(blobs.glob("*.incomplete"))

    process.send_signal(signal.SIGINT)

    assert process.wait(harness.DEADLINE_S) == 130
    assert list(blobs.glob("*.incomplete")) == []
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    tiny.stalls.clear()
    hub.requests.clear()
    assert invoke("pull", "org/tiny").returncode == 0
    assert hub.fetched() == [SHARD]
