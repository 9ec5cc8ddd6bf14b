"""People and protocols: HTTP, command line, metrics. Knows requests and text, no tensors."""
