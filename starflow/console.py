"""What commands print: answers on stdout, progress and remarks on stderr."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

#: For progress bars and one-line remarks; stdout stays free for the answer.
console = Console(stderr=True)


def print_json(answer: Any) -> None:
    """Prints `answer` (JSON types) on stdout, for ``--json``."""
    print(json.dumps(answer, indent=2, ensure_ascii=False, allow_nan=False))


def show_value(value: object) -> str:
    """A value as tables show it: numbers to four digits, nothing as "none yet"."""
    if value is None:
        return "none yet"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
