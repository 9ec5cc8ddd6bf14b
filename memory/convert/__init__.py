"""Conversion of checkpoints to other formats: planned, resumable, verified."""
