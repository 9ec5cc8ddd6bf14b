"""Several servers of a model behind one address, by Ray Serve.

`loci serve --replicas` answers HTTP itself and calls the replicas; in an application for a Serve config
(front.py, deploy/cluster), HTTP is Serve's. Either way there is one front, with the keys, the limits, the
tokenizer and the stored responses, and replicas that only compute.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry

from engine.embedded import model_path
from engine.families.loader import Loaded, OpenedModel, open_model
from quant.errors import ConfigError
from server.cluster.affinity import affinity_to
from server.cluster.application import STOP_S, Application
from server.cluster.asked import DEPLOYMENT, ReplicaInfo
from server.cluster.fingerprint import fingerprint
from server.cluster.metrics import ReplicaCollector
from server.cluster.ray_stages import LOCAL, check_installed, connect, looks, ray_module
from server.cluster.replica import Replica
from server.cluster.replicated import RemoteModel, ReplicatedEngine
from server.cluster.serving import check_copies, refuse_together
from server.serving.planned import planned
from server.serving.service import Served, served_names
from server.settings import Settings, resolve_settings

log = logging.getLogger("loci")

# Of the settings, those that are the front's own.
OF_THE_FRONT = {
    "host", "port", "served_model_name", "any_model", "max_tokens_overflow", "cluster", "stages", "replicas",
    "explain", "api_key", "api_key_file", "allowed_hosts", "cors_origins", "max_body_bytes", "read_timeout_s",
    "write_timeout_s", "response_store_bytes", "request_timeout_s", "drain_timeout_s", "measured_file",
    "max_waiting",
}  # fmt: skip
NOT_TOGETHER = {
    "stages": "a replica is a whole model",
    "prefix_disk": "states of prefixes stay in the memory of the replicas",
    "measured_file": "it is of one server",
}
TELLS_EVERY_S = 1.0
CALLS_AT_ONCE = 2048  # more than a replica is ever given: it is the front that refuses
STARTS = 3  # of a replica that cannot be loaded
ROUTER = "server.cluster.router:PrefixRouter"


@dataclass(frozen=True)
class Prepared:
    """A model about to be served by replicas: its settings and headers have been checked, here.

    application  what they will be in Serve, if it is this process that deploys them
    """

    settings: Settings
    names: tuple[str, ...]
    opened: OpenedModel
    application: Application = field(default_factory=Application)


def prepare(settings: Settings) -> Prepared:
    """Check what can be checked before Ray is asked. Raises LociError."""
    check_installed()
    refuse_together(settings, "--replicas", NOT_TOGETHER)
    path = model_path(settings.model)
    opened = open_model(path, settings.max_model_len, settings.experts)
    if settings.cluster == LOCAL:
        planned(settings, opened)  # what does not fit is said before anybody is told to connect
    return Prepared(settings, served_names(settings, path), opened)


def of_replicas(settings: Settings) -> dict[str, Any]:
    """The settings for the replicas, without the front's secrets."""
    given = settings.model_dump(exclude=OF_THE_FRONT, exclude_none=True)
    chosen = {name: value for name, value in given.items() if name in settings.model_fields_set}
    # The front counts what waits; what is left of a replica that died must find room with the others.
    return chosen | {"max_waiting": CALLS_AT_ONCE}


def settings_of_front(arguments: Mapping[str, Any], needs_key: bool) -> Settings:
    """The settings on the machine where the front is; `needs_key` says whether the application was made with
    keys. Raises ConfigError where it was and this machine has none: it would let everybody in."""
    settings = resolve_settings(arguments)
    if needs_key and not settings.needs_key:
        raise ConfigError(
            "the application was made with API keys, and Ray's environment on this machine has none: set "
            "LOCI_API_KEY there (or LOCI_API_KEY_FILE) before `ray start`"
        )
    if not settings.needs_key:
        log.warning("no API key is set: anyone who can reach Serve's HTTP can use it")
    return settings


def bring_up(prepared: Prepared, registry: CollectorRegistry) -> Served:
    """Start the replicas by Serve, and an engine here that calls them. Raises LociError."""
    settings, opened = prepared.settings, prepared.opened
    assert settings.cluster is not None
    assert settings.replicas is not None
    passed_on = of_replicas(settings) | {"model": str(opened.checkpoint.path)}
    ray = connect(settings.cluster)
    nodes = ray.nodes
    if len(nodes) > 1:
        check_copies(looks(passed_on, nodes), fingerprint(opened.checkpoint))
    sharing = -(-settings.replicas // len(nodes))
    if sharing > 1 and settings.dram_budget is None:
        log.warning("several replicas share a machine: each plans for all of its memory; set --dram-budget")
    options = {"num_replicas": settings.replicas, "max_replicas_per_node": sharing, "sharing": sharing}
    application = prepared.application
    handle = application.deploy(deployment(passed_on, **options), on_own_ray=ray.is_own)
    try:
        return connected(prepared, registry, handle, application.end)
    except BaseException:
        application.end()
        raise


def connected(
    prepared: Prepared,
    registry: CollectorRegistry,
    handle: Any,
    when_stopped: Callable[[], None] = lambda: None,
) -> Served:
    """The model as its replicas behind `handle` serve it."""
    settings, opened = prepared.settings, prepared.opened
    replica: ReplicaInfo = handle.describe.remote().result()
    affinity = affinity_to(DEPLOYMENT)
    engine = ReplicatedEngine(
        handle.options(stream=True),
        affinity,
        opened.tokenizer,
        opened.info,
        replica,
        settings.max_waiting,
        _means_loss,
        when_stopped,
    )
    registry.register(ReplicaCollector(affinity, engine))
    log.info("replicas of %d sequences of up to %s tokens", replica.slots, f"{replica.context:,}")
    loaded = Loaded(
        RemoteModel(opened.info), opened.tokenizer, opened.chat, opened.components, opened.sampling
    )
    name, *aliases = prepared.names
    cuts = settings.max_tokens_overflow == "cut"
    return Served(name, loaded, engine, aliases=tuple(aliases), cuts_answers=cuts)


def deployment(settings: Mapping[str, Any], **options: Any) -> Any:
    """The replicas as a deployment of Serve, which may be changed by `options` and by a config file."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    router = RequestRouterConfig(request_router_class=ROUTER, request_routing_stats_period_s=TELLS_EVERY_S)
    sharing = options.pop("sharing", 1)
    usual = {
        "name": DEPLOYMENT,
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": CALLS_AT_ONCE,
        "graceful_shutdown_timeout_s": STOP_S,
        "health_check_period_s": 2.0,
        "max_constructor_retry_count": STARTS,
        "request_router_config": router,
    }
    return serve.deployment(Replica, **(usual | options)).bind(dict(settings), sharing)


def _means_loss(error: BaseException) -> bool:
    from ray.serve.exceptions import DeploymentUnavailableError

    ray = ray_module()
    if isinstance(error, DeploymentUnavailableError):  # Serve has given up starting them for now
        return True
    is_of_ray = isinstance(error, ray.exceptions.RayError)
    return is_of_ray and not isinstance(error, ray.exceptions.RayTaskError)
