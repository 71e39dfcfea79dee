"""`python -m sft_recipes.training.launcher launch ...`: accelerate's command, which ends when its own parent does.

A launcher whose parent was killed (`kill -9`) would train on, unseen. Each rank notices the end of its parent in turn
(`train.py`), and saves a checkpoint.
"""

import os
import signal

from sft_recipes import stop_request

if __name__ == "__main__":
    stop_request.listen_for_parent(signal.SIGKILL)
    os.environ[stop_request.PARENT] = str(os.getpid())  # of the ranks

    from accelerate.commands.accelerate_cli import main

    main()
