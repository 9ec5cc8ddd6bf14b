"""What a model in parts cannot do yet is said before anything is loaded."""

from __future__ import annotations

import pytest

from quant.errors import ConfigError
from server.cluster import serving
from server.settings import resolve_settings
from tests.server.harness import TINY


@pytest.mark.parametrize(
    "setting", [{"draft_model": str(TINY)}, {"drafts": "mtp"}], ids=["small model", "layers"]
)
def test_parts_have_no_drafts_by_weights(monkeypatch: pytest.MonkeyPatch, setting: dict[str, object]) -> None:
    monkeypatch.setattr(serving, "check_installed", lambda: None)
    settings = resolve_settings({"model": TINY, "cluster": "auto", **setting})
    with pytest.raises(ConfigError, match=r"--draft.* and --cluster do not go together"):
        serving.prepare(settings)
