"""deploy/compose.yaml fits together: image, settings, Prometheus and Grafana find what they name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
import pytest
import yaml

from server.cli.serve import LAST_WORDS_S
from server.settings import Settings
from tests.server.harness import ROOT, TINY, LociServer

DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
LOCI = SERVICES["loci"]
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
RUNTIME = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
PROVISIONING = DEPLOY / "grafana" / "provisioning"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "loci.json").read_text())
UNIT = (DEPLOY / "systemd" / "loci.service").read_text()


def instruction(name: str) -> str:
    """What stands behind an instruction of the image that runs, one that it has once."""
    (found,) = re.findall(rf"^\s*{name}\s+(.*)$", RUNTIME, re.MULTILINE)
    return str(found)


def mounts(service: str) -> dict[str, str]:
    """Where each directory of this repository is in a service's container."""
    volumes = [volume.split(":") for volume in SERVICES[service]["volumes"]]
    return {target: source for source, target, *_ in volumes if source.startswith("./")}


def in_repository(service: str, path: str) -> Path:
    """The file of this repository that a service finds under `path`."""
    for target, source in mounts(service).items():
        if PurePosixPath(path).is_relative_to(target):
            return DEPLOY / source / PurePosixPath(path).relative_to(target)
    raise AssertionError(f"{service} has nothing at {path}")


def seconds(text: str) -> float:
    return float(re.fullmatch(r"(\d+)s?", text)[1])  # type: ignore[index]


def container_ports(service: str) -> list[str]:
    return [port.rpartition(":")[2] for port in SERVICES[service]["ports"]]


def with_gpus() -> str:
    """The file as its comment says to change it where there are GPUs."""
    text = (DEPLOY / "compose.yaml").read_text()
    (section,) = re.findall(r"^    # deploy:\n(?:    # .*\n)*?    # .*capabilities.*\n", text, re.MULTILINE)
    return text.replace(section, section.replace("    # ", "    "))


def test_gpus_are_given_to_loci_where_its_section_is_taken_in() -> None:
    assert "deploy" not in LOCI
    changed = yaml.safe_load(with_gpus())["services"]
    (device,) = changed["loci"].pop("deploy")["resources"]["reservations"]["devices"]

    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert changed == SERVICES
    assert LOCI["environment"]["LOCI_DEVICES"] == "${LOCI_DEVICES:-}"


@pytest.mark.skipif(
    shutil.which("docker-compose") is None,
    reason="no docker-compose is installed (Debian: apt-get install docker-compose)",
)
@pytest.mark.parametrize("text", [(DEPLOY / "compose.yaml").read_text(), with_gpus()], ids=["cpu", "gpus"])
def test_the_file_is_valid(tmp_path: Path, text: str) -> None:
    (tmp_path / "compose.yaml").write_text(text)
    command: list[str | Path] = ["docker-compose", "--file", tmp_path / "compose.yaml", "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 0, done.stdout + done.stderr


def test_ports_are_published_on_this_machine_only() -> None:
    assert all(port.startswith("127.0.0.1:") for service in SERVICES.values() for port in service["ports"])


def test_what_is_mounted_exists() -> None:
    found = [DEPLOY / source for service in SERVICES for source in mounts(service).values()]

    assert found
    assert [path for path in found if not path.is_dir()] == []
    named = {v.partition(":")[0] for s in SERVICES.values() for v in s["volumes"] if v[0] not in "./$"}
    assert named == set(COMPOSE["volumes"])


def test_its_variables_are_settings_of_loci_and_of_the_hub() -> None:
    fields = {f"LOCI_{name.upper()}" for name in Settings.model_fields}
    fields |= {"HF_HUB_CACHE", "HF_HUB_OFFLINE"}

    assert set(LOCI["environment"]) <= fields


def test_which_pytorch_an_image_gets_can_be_said_when_it_is_built() -> None:
    arguments = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))

    assert set(LOCI["build"]["args"]) == arguments == {"TORCH_INDEX"}
    assert (DEPLOY / LOCI["build"]["context"] / "Dockerfile").is_file()


def test_the_port_is_the_servers_own() -> None:
    port = str(Settings.model_fields["port"].default)

    assert container_ports("loci") == [port]
    assert instruction("EXPOSE") == port
    assert f"127.0.0.1:{port}/" in instruction("HEALTHCHECK")


def test_containers_and_units_are_given_more_time_than_a_drain_takes() -> None:
    longest = Settings.model_fields["drain_timeout_s"].default + LAST_WORDS_S
    (unit_s,) = re.findall(r"^TimeoutStopSec=(.*)$", UNIT, re.MULTILINE)

    assert seconds(LOCI["stop_grace_period"]) > longest
    assert seconds(unit_s) > longest


def test_the_image_runs_as_a_user_who_may_write_what_compose_leaves_writable() -> None:
    user, home = instruction("USER"), re.findall(r"HOME=(\S+)", instruction("ENV"))[0]
    variables = dict(re.findall(r"(\w+)=(\S+)", instruction("ENV")))
    writable = {PurePosixPath(mount.partition(":")[0]) for mount in LOCI["tmpfs"]}

    assert user == "1000:1000"
    assert "--uid 1000" in RUNTIME
    assert LOCI["read_only"] is True
    assert {PurePosixPath("/tmp"), PurePosixPath(home, ".cache")} <= writable
    assert PurePosixPath(variables["TRITON_CACHE_DIR"]).is_relative_to(PurePosixPath(home, ".cache"))


def test_compiled_kernels_can_be_loaded_from_where_they_are_kept() -> None:
    (cache,) = [mount for mount in LOCI["tmpfs"] if mount.partition(":")[0].endswith(".cache")]

    assert "exec" in cache.partition(":")[2].split(",")  # without it nothing in a tmpfs may be
    assert "gcc" in RUNTIME  # Triton compiles the launcher of each kernel


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LociServer]:
    """A server as the container starts it: the image's command line, compose's variables."""
    program, command, *arguments = json.loads(instruction("ENTRYPOINT"))
    assert (program, command) == ("loci", "serve")
    variables = {
        name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for name, value in LOCI["environment"].items()
    }
    started = LociServer(tmp_path_factory.mktemp("compose"), [TINY, *arguments], **variables)
    try:
        yield started.await_ready()
    finally:
        started.kill()


@pytest.mark.slow
def test_its_health_check_tells_a_server_from_none(served: LociServer) -> None:
    _, command = instruction("HEALTHCHECK").split("CMD ")
    program, flag, text = json.loads(command)
    assert (program, flag) == ("python", "-c")
    here = text.replace("http://127.0.0.1:8000", served.url)

    assert subprocess.run([sys.executable, flag, here], check=False, timeout=30).returncode == 0
    nowhere = here.replace(served.url, "http://127.0.0.1:1")
    failed = subprocess.run([sys.executable, flag, nowhere], check=False, timeout=30, capture_output=True)
    assert failed.returncode != 0


@pytest.mark.slow
def test_prometheus_is_let_in_by_the_name_it_asks_for_and_other_names_are_not(served: LociServer) -> None:
    config = yaml.safe_load(in_repository("prometheus", "/etc/prometheus/prometheus.yml").read_text())
    (target,) = config["scrape_configs"][0]["static_configs"][0]["targets"]
    service, _, port = target.partition(":")

    def status(host: str) -> int:
        return httpx.get(f"{served.url}/metrics", headers={"Host": host}).status_code

    assert service in SERVICES
    assert port in container_ports(service)
    assert status(target) == 200
    assert status("localhost:8000") == 200
    assert status("evil.example:8000") == 403
    for name in config["rule_files"]:
        assert in_repository("prometheus", f"/etc/prometheus/{name}").is_file()


def test_grafana_finds_its_data_source() -> None:
    content = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yaml").read_text())
    (source,) = content["datasources"]
    url = httpx.URL(source["url"])

    assert content["apiVersion"] == 1
    assert in_repository("grafana", "/etc/grafana/provisioning/datasources").is_dir()
    assert source["type"] == "prometheus"
    assert url.host in SERVICES["grafana"]["depends_on"]
    assert str(url.port) in container_ports(url.host)
    used = {json.dumps(found, sort_keys=True) for found in data_sources(DASHBOARD)}
    assert used == {json.dumps({"type": source["type"], "uid": "${DS_PROMETHEUS}"})}
    # Who imports the dashboard chooses the source; where it is provisioned, a variable of that name does.
    (asked,) = DASHBOARD["__inputs"]
    variable = DASHBOARD["templating"]["list"][0]
    assert asked["name"] == variable["name"] == "DS_PROMETHEUS"
    assert asked["pluginId"] == variable["query"] == source["type"]


def data_sources(value: Any) -> Iterator[Any]:
    """Every data source that a dashboard names: of panels, queries and variables."""
    if isinstance(value, dict):
        yield from (found for name, found in value.items() if name == "datasource")
        value = list(value.values())
    for each in value if isinstance(value, list) else ():
        yield from data_sources(each)


def test_grafana_finds_its_dashboard_and_shows_it_first() -> None:
    content = yaml.safe_load((PROVISIONING / "dashboards" / "loci.yaml").read_text())
    (provider,) = content["providers"]
    first = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]

    assert content["apiVersion"] == 1
    assert in_repository("grafana", "/etc/grafana/provisioning/dashboards").is_dir()
    assert provider["type"] == "file"
    assert list(in_repository("grafana", provider["options"]["path"]).glob("*.json"))
    assert in_repository("grafana", first) == DEPLOY / "grafana" / "dashboards" / "loci.json"
