"""`python -m server` is `loci`."""

from server.cli.main import process

process()
