"""Serve's router for replicas: it asks `Affinity`. Serve calls it with each request and each change."""

from __future__ import annotations

from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import (
    LocalityMixin,
    MultiplexMixin,
    RequestRouter,
)

from server.cluster.affinity import affinity_to
from server.cluster.asked import DEPLOYMENT, STATE, Asked, ReplicaState


class PrefixRouter(LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Prefers the replica that holds the longest prefix of a prompt, then the least busy one."""

    def initialize_state(self, **_: Any) -> None:
        """Serve calls it once."""
        self._affinity = affinity_to(DEPLOYMENT)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The replicas that there are, with what they told last."""
        super().update_replicas(replicas)
        self._affinity.keep_only(replica.replica_id.unique_id for replica in replicas)
        for replica in replicas:
            state = replica.routing_stats.get(STATE)
            if isinstance(state, ReplicaState):
                self._affinity.tell(replica.replica_id.unique_id, state)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A call has found that it is gone."""
        super().on_replica_actor_died(replica_id)
        self._affinity.lose(replica_id.unique_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Each replica by itself, the best first: Serve takes the first that accepts the request. The best
        one is asked twice, as a busy one may be late to say that it accepts."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # if none accepts it
        asked = _asked(pending_request)
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        blocks = () if asked is None else asked.blocks
        order = self._affinity.order(blocks, list(by_name))
        if asked is not None:
            # At once, for the next request that is decided on before this one is on its way.
            self._affinity.give(asked.attempt, order[0], blocks)
        return [[by_name[name]] for name in [*order[:1], *order]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica has accepted it."""
        asked = _asked(pending_request)
        if asked is not None:
            self._affinity.arrived(asked.attempt, replica_id.unique_id, asked.blocks)


def _asked(pending_request: PendingRequest) -> Asked | None:
    return next((each for each in pending_request.args if isinstance(each, Asked)), None)
