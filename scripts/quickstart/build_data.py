"""Write the quickstart's instruction data: train.jsonl, test.jsonl and composition.jsonl.

    python scripts/quickstart/build_data.py            # rewrites recipes/quickstart/data, byte for byte

The test rows are drawn first, so changing the number of training rows leaves the test set as it is.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from tasks import TASKS, Row, draw_rows, reverse_as_json

OUTPUT = Path(__file__).resolve().parents[2] / "recipes" / "quickstart" / "data"
SEED = 20
TRAIN_ROWS_PER_TASK = 300
TEST_ROWS_PER_TASK = 60
COMPOSITION_ROWS = 100


def generate(seed: int = SEED) -> dict[str, list[Row]]:
    """File name -> rows, in an order shuffled by the seed; no question occurs twice in all three files."""
    rng = random.Random(seed)
    taken: set[tuple[str, str]] = set()
    test = [row for task in TASKS for row in draw_rows(task, TEST_ROWS_PER_TASK, rng, taken)]
    composition = draw_rows(reverse_as_json, COMPOSITION_ROWS, rng, taken)
    train = [row for task in TASKS for row in draw_rows(task, TRAIN_ROWS_PER_TASK, rng, taken)]
    rng.shuffle(test)
    rng.shuffle(train)
    return {"train.jsonl": train, "test.jsonl": test, "composition.jsonl": composition}


def to_jsonl(rows: Sequence[Row]) -> str:
    """One JSON object a line, keys in the order of `Row`."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: writes the three files and says how many rows each got."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the three files")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, rows in generate(options.seed).items():
        (options.output / name).write_text(to_jsonl(rows), encoding="utf-8", newline="\n")
        print(f"{options.output / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
