"""Shared by all protocols: the service, a request's sequences, its answer as a whole or as a stream."""
