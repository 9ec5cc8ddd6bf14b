"""Numbers in JSON schemas that `llguidance`, which computes with doubles, would round.

Bounds from 2^53 on are narrowed to the next double inside them that fits 64 bits, so that no answer lies
outside. Larger numbers in `enum` and `const` cannot be written exactly, so they are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any, TypeGuard

from engine.grammar.schema import with_each
from quant.errors import RequestError

EXACT = 2**53  # up to here every integer is a double
FAREST = 2**63 - 1024  # the largest double below 2^63; the library fails for integers beyond
# An automaton for multiples has as many states, powers of two and five aside; more take minutes to compile.
MAX_MULTIPLE = 50_000


def with_safe_numbers(schema: Any, field: str, *, lenient: bool = False) -> Any:
    """`schema` with bounds that survive rounding. `lenient` drops keywords that cannot be enforced.

    Raises RequestError naming `field` for values and bounds that cannot be enforced.
    """
    if not isinstance(schema, Mapping):
        return schema
    safe = with_each(schema, lambda each: with_safe_numbers(each, field, lenient=lenient))
    for keyword in ("enum", "const"):
        if not _is_exact(safe.get(keyword)):
            if not lenient:
                text = f"{field}: {keyword} has a number beyond 2^53, which cannot be enforced; use a string"
                raise RequestError(text, param=field, code="invalid_grammar")
            del safe[keyword]
        elif keyword in safe:
            safe[keyword] = _readable(safe[keyword])
    _narrow(safe, "maximum", "exclusiveMaximum", 1, field, lenient)
    _narrow(safe, "minimum", "exclusiveMinimum", -1, field, lenient)
    return safe


def check_multiples(schema: Mapping[str, Any], field: str, *, merges: bool) -> None:
    """Raise RequestError naming `field` where `multipleOf` is too large to be enforced.

    merges    whether parts of the schema may bind one number together
    """
    multiples: list[int] = []

    def collect(each: Any) -> Any:
        if isinstance(each, Mapping):
            value = each.get("multipleOf")
            if _is_number(value) and value and (isinstance(value, int) or math.isfinite(value)):
                multiples.append(_without_tens(value))
            with_each(each, collect)
        return each

    collect(schema)
    if (math.lcm(*multiples) if merges else max(multiples, default=1)) > MAX_MULTIPLE:
        text = f"{field}: multipleOf is beyond {MAX_MULTIPLE} (or all together are), which cannot be enforced"
        raise RequestError(text, param=field, code="invalid_grammar")


def _without_tens(value: float) -> int:
    """The digits of a number without the factors two and five."""
    digits = int("".join(map(str, Decimal(repr(value)).as_tuple().digits)))
    for factor in (2, 5):
        while digits % factor == 0:
            digits //= factor
    return digits


def _narrow(
    schema: dict[str, Any], inclusive: str, exclusive: str, sign: int, field: str, lenient: bool
) -> None:
    """Put a safe inclusive bound in the place of bounds that are not; `sign` is -1 for lower ones."""
    if schema.get(exclusive) is True and _is_number(schema.get(inclusive)):  # as draft 4 writes it
        schema[exclusive] = schema.pop(inclusive)
    for name in (inclusive, exclusive):
        bound = schema.get(name)
        if not _is_number(bound):
            continue
        if abs(bound) < EXACT:
            schema[name] = _readable(bound, ROUND_FLOOR if sign > 0 else ROUND_CEILING)
            continue
        del schema[name]
        highest = _highest(sign * bound, is_exclusive=name == exclusive)
        if highest is not None:
            other = schema.get(inclusive)
            schema[inclusive] = sign * (min(highest, sign * other) if _is_number(other) else highest)
        elif not lenient:
            text = f"{field}: {name} leaves only numbers beyond 2^63, which cannot be enforced"
            raise RequestError(text, param=field, code="invalid_grammar")


def _highest(bound: float, *, is_exclusive: bool) -> int | None:
    """The highest safe integer within a large upper bound; None where there is none.

    A bound that was written with a point or an exponent may have been rounded up when it was read.
    """
    if bound > FAREST:
        return FAREST
    if bound < -FAREST:
        return None
    rounded = float(bound)
    if rounded > bound or (rounded == bound and (is_exclusive or isinstance(bound, float))):
        rounded = math.nextafter(rounded, -math.inf)
    return int(rounded)


def _readable(value: Any, rounding: str | None = None) -> Any:
    """A JSON value as the library reads it right: what has a point and more than 15 digits, it may not.

    Such numbers become integers where they are some, else shorter ones with `rounding`.
    """
    if isinstance(value, list):
        return [_readable(each) for each in value]
    if isinstance(value, Mapping):
        return {name: _readable(each) for name, each in value.items()}
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, float) and rounding is not None:
        return float(Context(prec=15, rounding=rounding).create_decimal(repr(value)))
    return value


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _is_exact(value: object) -> bool:
    """Whether all numbers in a JSON value are small enough to be written as they are."""
    if isinstance(value, list):
        return all(map(_is_exact, value))
    if isinstance(value, Mapping):
        return all(map(_is_exact, value.values()))
    return not _is_number(value) or abs(value) <= EXACT
