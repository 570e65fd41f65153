"""STARFlow: a text-to-image normalizing flow, and the two stores its data and checkpoints live in."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("starflow")
except PackageNotFoundError:  # run from a source tree that is not installed, as `make gpu` may
    __version__ = "source"
