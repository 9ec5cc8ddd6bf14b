"""Bodies that were compressed for the way: gzip and deflate, never more of them than a body may have."""

from __future__ import annotations

import zlib

from server.http.errors import ApiError

# What zlib calls the formats: gzip's header; zlib's own, or none at all.
_WINDOWS = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}


def decoded(body: bytes, encoding: str, limit_bytes: int) -> bytes | None:
    """The body as it was before `encoding` (the header Content-Encoding); None if it exceeds the limit.

    Raises ApiError 415 for an encoding that is not known, 400 for a body that is not in it.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in _WINDOWS:
        text = f"Content-Encoding: {name} is not supported; send gzip, deflate or no encoding"
        raise ApiError(415, text, code="unsupported_content_encoding")
    for window in _WINDOWS[name]:
        reader = zlib.decompressobj(window)
        try:
            plain = reader.decompress(body, limit_bytes + 1)
        except zlib.error:
            continue
        if len(plain) > limit_bytes:
            return None
        if reader.eof:
            return plain
    raise ApiError(400, f"the body is not {name}, as Content-Encoding says", code="invalid_encoding")
