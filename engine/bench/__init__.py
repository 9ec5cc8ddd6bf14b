"""Measurements of the engine, without a server; `loci bench` prints them."""
