"""Pictures that commands draw: what they need, and where they are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory.user_files import whole_file
from quant.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def need_matplotlib() -> None:
    """Raise ConfigError where nothing can be drawn: before long work, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None


@contextmanager
def picture(file: Path, columns: int, **figure_options: Any) -> Iterator[list[Axes]]:
    """So many axes side by side, written to `file` as PNG at the end."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, layout="constrained", squeeze=False, **figure_options)
    try:
        yield list(axes[0])
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    finally:
        plt.close(figure)
