"""Errors about fields of the chat request name what the client of another protocol has sent instead."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from pydantic import ValidationError

from quant.errors import RequestError
from server.http.errors import from_validation


@contextmanager
def own_names(names: Mapping[str, str]) -> Generator[None]:
    """Fields are called by `names`, patterns of the chat request's fields and what replaces them."""
    try:
        yield
    except RequestError as error:
        raise _renamed(str(error), error.param, error.code, names) from None
    except ValidationError as error:
        found = from_validation(error)
        raise _renamed(found.message, found.param, found.code, names) from None


def _renamed(text: str, param: str | None, code: str | None, names: Mapping[str, str]) -> RequestError:
    if param is None:
        return RequestError(text, code=code)
    for pattern, name in names.items():
        own, count = re.subn(rf"\A{pattern}(?![\w])", name, param)
        if count:
            return RequestError(text.replace(param, own), param=own, code=code)
    return RequestError(text, param=param, code=code)
