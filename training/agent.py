"""torchrun, made fit for the supervisor: ``python -m training.agent TORCHRUN_ARGUMENTS``.

It ends with the supervisor, leaves signals to the workers (a scheduler's SIGTERM to every process means "save
and leave", and torchrun would kill them), and does not print a traceback for each rank that ended.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from training.processes import PARENT, die_with_parent


def main() -> None:
    """Runs torchrun in this process; exit status 0 only if all ranks ended with 0."""
    die_with_parent()
    os.environ[PARENT] = str(os.getpid())  # of the ranks
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    logging.disable(logging.ERROR)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(sys.argv[1:])
    except ChildFailedError:
        sys.exit(1)


if __name__ == "__main__":
    main()
