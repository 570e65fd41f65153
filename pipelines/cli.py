"""Command: refresh."""

from __future__ import annotations

from pipelines.refresh_command import refresh

__all__ = ["refresh"]
