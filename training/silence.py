"""How long others have been silent, told without comparing clocks."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Silence:
    """For how long objects that others keep changing have stayed the same, as this machine has seen itself.

    Clocks of machines differ, so no time that another one wrote counts. Nor does time in which this one did not see
    the store, as the others may not have reached it either: after a third of `seconds` without a look, counts begin
    anew; only what had been silent for `seconds` stays so until it changes.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self._looked = seconds, time.monotonic()
        self._since: dict[tuple[str, str], float] = {}  # key and tag: when they were first seen together

    def look(self, tags: Mapping[str, str]) -> dict[str, float]:
        """Seconds of silence by key, after a look at the store that found these keys with these tags."""
        now, before = time.monotonic(), self._since
        if now - self._looked > self.seconds / 3:
            before = {pair: since for pair, since in before.items() if self._looked - since >= self.seconds}
        self._looked, self._since = now, {pair: before.get(pair, now) for pair in tags.items()}
        return {key: now - since for (key, _), since in self._since.items()}
