"""STARFlow: a text-to-image normalizing flow, and the two stores its data and checkpoints live in."""

from importlib.metadata import version

__version__ = version("starflow")
