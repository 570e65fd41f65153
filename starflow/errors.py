"""Errors meant for people: each message names the thing, its value and the remedy."""

#: The remedy for a missing or half-installed package.
REINSTALL = "install it with: pip install -c constraints.txt -e '.[demo]'"

#: Exit status of a command that the store gave no answer to (EX_IOERR of sysexits.h): worth another try, unlike 1.
UNAVAILABLE_STATUS = 74


class StarflowError(Exception):
    """Base of every error that the command line prints as one sentence, without a traceback."""


class ConfigError(StarflowError):
    """A configuration value that cannot be used."""


class StoreError(StarflowError):
    """An object-store operation that failed for good, after its retries."""


class UnavailableError(StoreError):
    """The store gave no answer for as long as an operation is retried: the same may work later."""


class AlreadyExistsError(StoreError):
    """Create-if-absent found the key taken by different bytes: somebody else committed first."""


class ChangedError(StoreError):
    """Replace-if-unchanged found that somebody else has written the key since it was read."""


class NotFoundError(StoreError):
    """A key, snapshot, run or checkpoint that does not exist."""


class CorruptError(StoreError):
    """Stored bytes that do not match the size or checksum their manifest gives."""
