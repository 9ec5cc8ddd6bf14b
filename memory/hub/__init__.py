"""Models of the Hugging Face Hub: their names, which of their files are needed, the cache, downloads.

Nothing here is fetched unless a user named the model.
"""

from __future__ import annotations

import os

# Read by huggingface_hub when it is imported, which all modules here do later than this. It would otherwise
# ask the Hub for a list of programs that may have called it, and tell it about installed packages.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
