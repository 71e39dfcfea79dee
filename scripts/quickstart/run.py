"""`make quickstart`: the whole loop on the embedded base model and data, command by command, as a user would type it.

Everything it prints about quality is measured in this run, on synthetic data.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = "recipes/quickstart"
RUN = "runs/quickstart-full"

STEPS = (
    (
        "Rows as the trainer sees them: green is trained, grey is only read",
        f"inspect {QUICKSTART}/full.yaml --rows 3",
    ),
    (
        "The base model answers the 600 test rows",
        f"evaluate {QUICKSTART}/base --data {QUICKSTART}/data --max_new_tokens 48 --batch_size 200 "
        "--output runs/quickstart-base --examples 0",
    ),
    ("Supervised fine-tuning", f"train {QUICKSTART}/full.yaml"),
    (
        "A composition of two skills that no training row shows (synthetic)",
        f"evaluate {RUN} --data {QUICKSTART}/data/composition.jsonl --max_new_tokens 48 --batch_size 200 --examples 1",
    ),
    (
        "Base and tuned model side by side, on the same 600 rows (synthetic), and the gate: may this model pass?",
        f"evaluate {RUN} --base runs/quickstart-base --max_new_tokens 48 --batch_size 200 --examples 4 "
        f"--gate {QUICKSTART}/gate.yaml",
    ),
)

# The model is too small to share among threads (two took longer than one on a busy two-core machine), and glibc
# otherwise returns memory to the system after every step.
FASTER_ON_CPU = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}

FOR_YOUR_OWN_DATA = """
For your own data (JSON, JSONL, CSV or Parquet; the format is detected):

  sft-recipes init --model MODEL --data DATA.jsonl --output mine
  sft-recipes train mine/recipe.yaml
  sft-recipes evaluate mine/run --base MODEL
"""


def main() -> int:
    """Run all steps from the repository's root; stops at the first one that fails and returns its exit code."""
    started = time.monotonic()
    environment = {**FASTER_ON_CPU, **os.environ, "HF_HUB_OFFLINE": "1"}
    for number, (title, command) in enumerate(STEPS, start=1):
        print(f"\n== {number}/{len(STEPS)} {title}\n$ sft-recipes {command}\n", flush=True)
        arguments = [sys.executable, "-m", "sft_recipes", *shlex.split(command)]
        code = subprocess.run(arguments, cwd=ROOT, env=environment, check=False).returncode
        if code:
            return code
    print(f"\nreport: {RUN}/evaluations/eval/report.html")
    print(f"the whole loop took {time.monotonic() - started:.0f} s")
    print(FOR_YOUR_OWN_DATA)
    return 0


if __name__ == "__main__":
    sys.exit(main())
