"""Checkpoints on disk: headers, tensors, reads. Nothing here unpickles anything."""
