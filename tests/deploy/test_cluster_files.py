"""deploy/cluster fits together: Serve reads its config, KubeRay its manifest, and both name what exists."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import jsonschema_rs
import pytest
import yaml

from server.cluster.asked import APPLICATION, DEPLOYMENT
from server.settings import Settings
from tests.server.harness import ROOT

FOLDER = ROOT / "deploy" / "cluster"
CONFIG = yaml.safe_load((FOLDER / "serve.yaml").read_text())
SERVICE, POLICY = yaml.safe_load_all((FOLDER / "rayservice.yaml").read_text())
CLUSTER = SERVICE["spec"]["rayClusterConfig"]
IN_SERVICE = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
CONFIGS = pytest.mark.parametrize("config", [CONFIG, IN_SERVICE], ids=["serve", "rayservice"])

# What KubeRay's resource definition requires and knows, as far as the manifest goes: names and types of
# ray-operator/apis/ray/v1, and of Kubernetes' pods.
TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def closed(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """An object that has these fields and no others."""
    properties = required | optional
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
    }


CONTAINER = closed(
    {"name": TEXT, "image": TEXT},
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    envFrom={"type": "array"},
    ports={"type": "array", "items": closed({"containerPort": COUNT}, name=TEXT)},
    volumeMounts={"type": "array", "items": closed({"name": TEXT, "mountPath": TEXT, "readOnly": {}})},
    resources=closed({}, requests=TEXTS, limits=TEXTS),
)
POD = closed(
    {"containers": {"type": "array", "minItems": 1, "items": CONTAINER}},
    securityContext={"type": "object"},
    volumes={"type": "array"},
)
GROUP = {"rayStartParams": TEXTS, "template": closed({"spec": POD})}
WORKERS = closed(GROUP | {"groupName": TEXT, "minReplicas": COUNT, "maxReplicas": COUNT}, replicas=COUNT)
RAY_SERVICE = closed(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayService"},
        "metadata": closed({"name": TEXT}),
        "spec": closed(
            {
                "serveConfigV2": TEXT,
                "rayClusterConfig": closed(
                    {"headGroupSpec": closed(GROUP)},
                    rayVersion=TEXT,
                    authOptions=closed({"mode": {"enum": ["token", "disabled"]}}),
                    workerGroupSpecs={"type": "array", "items": WORKERS},
                ),
            }
        ),
    }
)


def test_the_manifest_has_what_kuberay_requires_and_nothing_it_does_not_know() -> None:
    assert [error.message for error in jsonschema_rs.validator_for(RAY_SERVICE).iter_errors(SERVICE)] == []


@CONFIGS
def test_configs_are_of_the_application_that_there_is(config: dict[str, Any]) -> None:
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")

    assert application["name"] == APPLICATION
    source = ROOT / f"{module.replace('.', '/')}.py"
    assert re.search(rf"^def {name}\(", source.read_text(), re.MULTILINE)
    assert [deployment["name"] for deployment in application["deployments"]] == [DEPLOYMENT]
    Settings(**application["args"])


@CONFIGS
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (extra `cluster`)")
def test_serve_reads_its_configs(config: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    read = ServeDeploySchema.model_validate(config)
    (application,) = read.applications
    assert application.deployments[0].autoscaling_config is not None
    assert set(config) <= set(ServeDeploySchema.model_fields)  # it would take others without a word
    assert set(config["http_options"]) <= set(type(read.http_options).model_fields)


def test_clients_inside_kubernetes_may_ask_for_the_service_by_its_name() -> None:
    (application,) = IN_SERVICE["applications"]
    assert Settings(**application["args"]).host_names is None
    assert Settings(**CONFIG["applications"][0]["args"]).host_names is not None


def test_nothing_listens_beyond_a_machine_unless_told_and_calls_carry_a_token() -> None:
    assert CONFIG["http_options"]["host"] == "127.0.0.1"
    assert CLUSTER["authOptions"] == {"mode": "token"}
    for group in (CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"]  # keys: the front may be on any of them
    readme = (FOLDER / "README.md").read_text()
    assert "RAY_AUTH_MODE=token" in readme
    assert "--include-dashboard=false" in readme


def test_the_version_of_ray_is_the_one_that_is_required() -> None:
    (required,) = re.findall(r'"ray\[serve\]~=([\d.]+)"', (ROOT / "pyproject.toml").read_text())

    assert CLUSTER["rayVersion"] == required
    assert f"ray[serve]~={required}" in (FOLDER / "Dockerfile").read_text()


def test_replicas_are_where_their_resource_is_and_only_they_may_be_called() -> None:
    (replica,) = IN_SERVICE["applications"][0]["deployments"]
    (workers,) = CLUSTER["workerGroupSpecs"]
    (name,) = replica["ray_actor_options"]["resources"]

    assert name in workers["rayStartParams"]["resources"]
    assert replica["autoscaling_config"]["max_replicas"] <= workers["maxReplicas"]
    open_to_all = [rule for rule in POLICY["spec"]["ingress"] if "from" not in rule]
    assert [port["port"] for rule in open_to_all for port in rule["ports"]] == [8000]
