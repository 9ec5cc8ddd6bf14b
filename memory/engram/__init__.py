"""Engram tables: rows prefetched from DRAM and disk."""
