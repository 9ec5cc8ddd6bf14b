"""The installed distribution: Loci's version, its files, and the packages it needs."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

DISTRIBUTION = "loci-server"  # `loci` on the public index is another package


def version_of(package: str) -> str | None:
    """The installed version of `package`, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def required_packages() -> tuple[str, ...]:
    """Names of the packages that Loci needs, without extras; none if Loci itself is not installed."""
    try:
        requirements = distribution(DISTRIBUTION).requires or []
    except PackageNotFoundError:
        return ()
    names = (re.match(r"[\w.-]+", line) for line in requirements if "extra ==" not in line)
    return tuple(name.group() for name in names if name)


def installed_file(name: str) -> Path | None:
    """The installed file whose path ends with `name`; None if there is none."""
    try:
        files = distribution(DISTRIBUTION).files or []
    except PackageNotFoundError:
        return None
    found = (Path(str(file.locate())).resolve() for file in files if file.match(name))
    return next((path for path in found if path.is_file()), None)
