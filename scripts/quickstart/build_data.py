"""Write the quickstart's instruction data: train.jsonl, test.jsonl and composition.jsonl.

    python scripts/quickstart/build_data.py            # rewrites recipes/quickstart/data, byte for byte

The test rows are drawn first, so changing the number of training rows leaves the test set as it is. Training rows that
`sft-recipes audit` would call a split leak or contamination of a test row are drawn again, as far as there are others.
"""

import argparse
import contextlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

from sft_recipes.audit.contamination import check_contamination, check_split_leak
from sft_recipes.audit.finding import AuditRow, audit_rows
from sft_recipes.messages import Example
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
    drawn = {task: draw_rows(task, TRAIN_ROWS_PER_TASK, rng, taken) for task in TASKS}
    rng.shuffle(test)
    while leaking := leaking_rows(
        [row for rows in drawn.values() for row in rows], test + composition
    ):
        for task, rows in drawn.items():
            for row in [row for row in rows if row in leaking]:
                rows.remove(row)
                with contextlib.suppress(
                    ValueError
                ):  # few questions: none is left that differs enough from the test
                    rows += draw_rows(task, 1, rng, taken)
    train = [row for rows in drawn.values() for row in rows]
    rng.shuffle(train)
    return {"train.jsonl": train, "test.jsonl": test, "composition.jsonl": composition}


def leaking_rows(train: Sequence[Row], held_out: Sequence[Row]) -> list[Row]:
    """The training rows that the audit finds too close to a held-out row."""
    rows, others = as_audited(train, "train"), as_audited(held_out, "held out")
    findings = (check_contamination(rows, {"held out": others})[0], check_split_leak(rows, others))
    return [
        train[index]
        for index in sorted({row.index for finding in findings for row in finding.rows})
    ]


def as_audited(rows: Sequence[Row], source: str) -> list[AuditRow]:
    """Rows as the audit sees them."""
    examples = []
    for number, row in enumerate(rows):
        prompt = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": row["output"]},
        ]
        examples.append(Example(messages, source, number))
    return audit_rows(examples)


def to_jsonl(rows: Sequence[Row]) -> str:
    """One JSON object a line, keys in the order of `Row`."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: writes the three files and says how many rows each got."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the three files")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, rows in generate(options.seed).items():
        (options.output / name).write_text(to_jsonl(rows), encoding="utf-8", newline="\n")
        print(f"{options.output / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
