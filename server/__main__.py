"""`python -m server` is `loci`."""

from server.cli import main

main()
