"""Routed experts: their placement, movement and computation."""
