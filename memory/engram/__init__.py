"""Engram tables: rows looked up ahead of need, from DRAM and disk."""
