"""What no model is: numbers in a config that every family would read, but that cannot go together."""

from __future__ import annotations

from collections.abc import Sequence

from engine.families.decoder.description import Experts, Layer, Router

# Every matrix of every expert is looked for by name: a config that says more is damaged.
MOST_EXPERTS = 1_000_000  # of all layers together


def problems_of(layers: Sequence[Layer]) -> list[str]:
    """What is wrong with these layers; empty where nothing is."""
    experts = [layer.feed_forward for layer in layers if isinstance(layer.feed_forward, Experts)]
    found = [problem for each in dict.fromkeys(experts) for problem in _of_router(each.router)]
    total = sum(each.router.experts for each in experts)
    if total > MOST_EXPERTS:
        found.append(f"the config says {total} experts in all; no model has more than {MOST_EXPERTS}")
    return found


def _of_router(router: Router) -> list[str]:
    groups, found = router.groups, []
    if groups is None:
        if router.top_k > router.experts:
            found.append(f"a token uses {router.top_k} experts, but there are only {router.experts}")
        return found
    each = router.experts // groups.count
    if groups.kept > groups.count:
        found.append(f"{groups.kept} groups of experts are kept, but there are only {groups.count}")
    if router.top_k > each * groups.kept:
        found.append(
            f"a token uses {router.top_k} experts, but {groups.kept} groups have only {each * groups.kept}"
        )
    if groups.best > each:
        found.append(f"groups are judged by {groups.best} experts, but have only {each}")
    return found
