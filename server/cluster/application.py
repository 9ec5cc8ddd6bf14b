"""The replicas as an application of Serve: deployed by one server, and taken away however that ends."""

from __future__ import annotations

import logging
import re
import threading
import time
from contextlib import suppress
from typing import Any

from quant.errors import ConfigError
from server.cluster.asked import APPLICATION

log = logging.getLogger("loci")

STOP_S = 30.0  # that a replica gets for what it computes when it is taken away
GIVE_UP_S = 5.0  # to tell Serve; the process ends then in any case
_RAISED = re.compile(r"^quant\.errors\.\w+: (.+)$", re.MULTILINE)


class Application:
    """What this process has deployed. On a Ray of its own, all ends with it and nothing needs to be done."""

    def __init__(self) -> None:
        self._is_left_behind = False  # where nobody takes it away

    def deploy(self, bound: Any, *, on_own_ray: bool) -> Any:
        """A handle to the replicas, once they are up. Raises ConfigError where they cannot be, or others are
        there."""
        from ray import serve

        _await_name()
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled")
        self._is_left_behind = not on_own_ray
        try:
            return serve.run(bound, name=APPLICATION, route_prefix=None)
        except RuntimeError as error:
            self.end()
            said = _RAISED.findall(str(error))
            why = said[-1] if said else f"Ray's logs say why ({str(error).strip().splitlines()[-1]})"
            raise ConfigError(f"the replicas cannot be started: {why}") from None

    def end(self) -> None:
        """Take the replicas away from a Ray that goes on; returns once they are gone."""
        if not self._is_left_behind:
            return
        from ray import serve

        try:
            serve.delete(APPLICATION)
            if not serve.status().applications:
                serve.shutdown()  # it was started without HTTP, which who comes next may want
        except TimeoutError:
            log.warning("Ray Serve has not taken the replicas away yet; it goes on with it")
        self._is_left_behind = False

    def give_up(self) -> None:
        """Have them taken away without waiting for it: this process ends now."""
        if self._is_left_behind:
            thread = threading.Thread(target=_delete, name="loci-give-up", daemon=True)
            thread.start()
            thread.join(GIVE_UP_S)


def _delete() -> None:
    from ray import serve

    with suppress(Exception):  # there may be no Serve any more
        serve.delete(APPLICATION, _blocking=False)
        serve.status()  # an answer says that it has been heard


def _await_name() -> None:
    """Wait for an application that is being taken away. Raises ConfigError where there is another one."""
    from ray import serve

    end = time.monotonic() + 2 * STOP_S
    while (found := serve.status().applications.get(APPLICATION)) is not None:
        if found.status != "DELETING" or time.monotonic() > end:
            raise ConfigError(
                f"this Ray runs an application named {APPLICATION} already, with its own replicas: end the "
                "server that started it; if that was killed, docs/cluster.md (Replicas) says how to end them"
            )
        time.sleep(0.5)
