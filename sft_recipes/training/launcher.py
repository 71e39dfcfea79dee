"""`python -m sft_recipes.training.launcher launch ...`: accelerate's command, which ends when its own parent does.

A launcher whose parent was killed (`kill -9`) would train on, unseen. Each rank notices the end of its parent in turn
(`train.py`), and saves a checkpoint.
"""

import os
import signal
import subprocess
import sys

from sft_recipes import stop_request


def launch() -> int:
    """Run accelerate's command. Ranks have said what went wrong: a traceback of the launcher would bury it."""
    from accelerate.commands.accelerate_cli import main
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        main()
    except (SignalException, ChildFailedError, subprocess.CalledProcessError):
        return 1
    return 0


if __name__ == "__main__":
    stop_request.listen_for_parent(signal.SIGKILL)
    os.environ[stop_request.PARENT] = str(os.getpid())  # of the ranks
    sys.exit(launch())
