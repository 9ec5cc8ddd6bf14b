"""Packed formats, one codec a file, and how a checkpoint says which it uses."""
