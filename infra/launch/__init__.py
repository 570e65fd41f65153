"""Launching a run: on this machine, over ssh, on Slurm, Kubernetes or Ray; and looking after what was launched.

The store holds the configuration and what was submitted, so any machine that reaches it can ask and stop.
"""

from infra.launch.api import AlreadyLaunchedError, active, logs, newest, prepare, status, stop, submit
from infra.launch.common import Launch, LaunchConfig, Launcher, Node

__all__ = [
    "AlreadyLaunchedError",
    "Launch",
    "LaunchConfig",
    "Launcher",
    "Node",
    "active",
    "logs",
    "newest",
    "prepare",
    "status",
    "stop",
    "submit",
]
