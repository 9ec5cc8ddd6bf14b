"""The front of replicas as a deployment of Serve: the application of `loci serve`, behind Serve's HTTP."""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve

from server.app import create_app
from server.cluster.replica import listen_where_ray_does
from server.cluster.replicas import connected, deployment, of_replicas, prepare, settings_of_front
from server.http.logs import configure_logging
from server.metrics import Metrics
from server.serving.service import Service
from server.settings import resolve_settings

log = logging.getLogger("loci")

CONNECTIONS = 4096  # requests at once; those that compute are limited by the engine and by keys


@serve.ingress()  # type: ignore[untyped-decorator, unused-ignore]  # Ray has no types
class Front:
    """Keys, limits, prompts' tokens, stored responses: there is one, so that these are counted once."""

    def __init__(self, arguments: dict[str, Any], replicas: Any, needs_key: bool) -> None:
        listen_where_ray_does()
        settings = settings_of_front(arguments, needs_key)
        configure_logging(settings.log_level, settings.log_format)
        self._service = Service(settings, Metrics(), settings.model)
        self._service.metrics.observe_process()
        bring_up = partial(connected, prepare(settings), self._service.metrics.registry, replicas)
        self._service.load_in_background(bring_up, self._when_loaded)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls it once."""
        return create_app(self._service)

    def check_health(self) -> None:
        """Serve starts it again where this raises."""
        if self._service.failure is not None:
            raise RuntimeError("the front cannot serve") from self._service.failure

    def _when_loaded(self) -> None:
        if self._service.failure is not None:
            log.error("%s", self._service.failure)
            sys.stderr.flush()


def app(arguments: dict[str, Any]) -> Any:
    """The application for a Serve config: `arguments` are settings by name; others come from LOCI_* in the
    environment of the machines, as keys should. Raises ConfigError."""
    settings = resolve_settings(arguments)
    options = {"name": "front", "num_replicas": 1, "max_ongoing_requests": CONNECTIONS}
    deployed = serve.deployment(Front, ray_actor_options={"num_cpus": 0}, **options)
    return deployed.bind(arguments, deployment(of_replicas(settings)), settings.needs_key)
