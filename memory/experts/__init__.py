"""Routed experts: where each one is, how it moves, who computes it."""
