"""What the steps of `benchmarks.real_models` left behind, read back: systems, learning rates, forgetting."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sft_recipes.evaluation.metrics import METRICS
from sft_recipes.evaluation.retention import passed
from sft_recipes.evaluation.samples import SAMPLES, read_samples
from sft_recipes.statistics import Estimate, proportion_of

Row = Mapping[str, Any]
BASE_WAYS = {
    "": "base, as it came",
    "first_answer": "base, first answer",
    "shots": "base, {shots} shots",
    "shots/first_answer": "base, {shots} shots, first answer",
}
KINDS = {"lora": "tuned, LoRA", "full": "tuned, full"}


@dataclass(frozen=True)
class System:
    """One way of answering the test rows; of several seeds each value is the mean of their rows."""

    name: str
    rows_by_seed: Sequence[Sequence[Row]]
    is_tuned: bool = False
    minutes: float | None = None

    def values(self, column: str, held_out: bool | None = None) -> list[float]:
        """A value for each test row, the mean over seeds; of held-out families, trained ones, or all."""
        values = []
        for same_row in zip(*self.rows_by_seed, strict=True):
            if held_out is None or same_row[0]["held_out"] == held_out:
                values.append(fmean(float(row[column] or 0) for row in same_row))
        return values

    def estimates(self) -> dict[str, Estimate]:
        """What a line of the table shows."""
        return {
            "exact_match": proportion_of(self.values("exact_match", held_out=False)),
            "held_out": proportion_of(self.values("exact_match", held_out=True)),
            "eos": proportion_of(self.values("eos")),
            "well_formed": proportion_of(self.values("well_formed")),
            "constraints": proportion_of(self.values("constraints")),
        }

    def length_ratio(self) -> float | None:
        """The median over all rows of all seeds."""
        metric = METRICS["length_ratio"]
        values = [row["length_ratio"] for rows in self.rows_by_seed for row in rows]
        return metric.estimate(values).value

    def by_family(self) -> dict[str, float]:
        """Exact match of each family."""
        families: dict[str, list[float]] = {}
        for row, value in zip(self.rows_by_seed[0], self.values("exact_match"), strict=True):
            families.setdefault(str(row["task_type"]), []).append(value)
        return {name: fmean(values) for name, values in families.items()}


def read_rows(folder: Path, held_out: Sequence[str]) -> list[Row]:
    """The scored rows of an evaluation, with what the tables count."""
    rows: list[Row] = []
    for row in read_samples(folder):
        constraints = "constraint_fail" not in row["flags"]
        rows.append({**row, "constraints": constraints, "held_out": row["task_type"] in held_out})
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the benchmark."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Results:
    """Everything that is known of one model."""

    work: Path

    @property
    def first(self) -> Path:
        """The evaluation beside which the base was asked."""
        return self.answers("lora-1")

    def answers(self, name: str) -> Path:
        """Where a run's answers to the test split lie."""
        return self.work / name / "evaluations" / "test"

    def is_evaluated(self, name: str) -> bool:
        """Whether a run has answered."""
        return (self.work / f"evaluate-{name}.json").is_file()

    def jobs(self) -> int:
        """How many runs shared the machine."""
        return int(read_json(self.work.parent / "machine.json")["jobs"])

    def held_out(self) -> list[str]:
        """The families that no training row shows."""
        evaluated = sorted(self.work.glob("evaluate-*.json"))
        run = evaluated[0].stem.removeprefix("evaluate-")
        tasks = read_json(self.answers(run) / "metrics.json")["task_differences"]
        return [name for name, task in tasks.items() if task["training_rows"] == 0]

    def systems(self) -> Iterator[System]:
        """The base in every way it was asked, then the tuned models."""
        held_out = self.held_out()
        for way, name in BASE_WAYS.items():
            folder = self.first / "base" / way
            if (folder / SAMPLES).is_file():
                prompting = read_json(self.first / "metrics.json")["prompting"]
                shots = prompting.get("shots", {}).get("shots")
                yield System(name.format(shots=shots), [read_rows(folder, held_out)])
        for kind, name in KINDS.items():
            runs = [run.name for run in sorted(self.work.glob(f"{kind}-[0-9]"))]
            runs = [run for run in runs if self.is_evaluated(run)]
            if runs:
                rows = [read_rows(self.answers(run), held_out) for run in runs]
                minutes = fmean(self.seconds(f"train-{run}") for run in runs) / 60
                alone = minutes if self.jobs() == 1 else None
                yield System(f"{name}, {len(rows)} seeds", rows, True, alone)

    def seconds(self, step: str) -> float:
        """How long a step took."""
        return float(read_json(self.work / f"{step}.json")["seconds"])

    def loss(self, name: str) -> float:
        """The loss of a model on the validation split."""
        return float(read_json(self.work / f"loss-{name}.json")["printed"]["loss"])

    def rates(self, kind: str) -> dict[str, dict[str, float]]:
        """By learning rate tried: exact match and loss on the validation split at the end of training."""
        found = {}
        for file in self.work.glob(f"train-rate-{kind}-*.json"):
            name = file.stem.removeprefix("train-")
            values: dict[str, float] = {}
            for line in (self.work / name / "log.jsonl").read_text(encoding="utf-8").splitlines():
                values |= json.loads(line)
            rate = name.removeprefix(f"rate-{kind}-")
            found[rate] = {"exact_match": values["eval_exact_match"], "loss": values["eval_loss"]}
        return dict(sorted(found.items(), key=lambda item: float(item[0])))

    def retention(self, name: str) -> "Retention | None":
        """What the seeds of a run pass of the general prompts, and what the model passed before; None: never asked."""
        seeds = [run.name for run in sorted(self.work.glob(f"{name}-[0-9]"))]
        asked = [seed for seed in seeds if (self.answers(seed) / "retention" / SAMPLES).is_file()]
        if not asked:
            return None
        before = self.first / "base" / "retention"
        after = [passed(read_samples(self.answers(seed) / "retention")) for seed in asked]
        return Retention(
            passed(read_samples(before)),
            [fmean(values) for values in zip(*after, strict=True)],
            System(name, [read_rows(self.answers(seed), ()) for seed in asked]),
        )


@dataclass(frozen=True)
class Retention:
    """By general prompt the share of seeds that pass it, before tuning 0 or 1; `task`: the same runs' test rows."""

    before: Sequence[float]
    after: Sequence[float]
    task: System
