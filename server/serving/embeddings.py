"""Why there are no embeddings."""

from __future__ import annotations

from server.http.errors import ApiError


def no_embeddings() -> ApiError:
    """400 for the routes on which other servers make them."""
    return ApiError(
        400,
        "this server makes no embeddings: hidden states of a model that was trained to write text compare "
        "badly; run a model that was trained for embeddings beside it",
        code="embeddings_not_supported",
    )
