"""The results page of `benchmarks.real_models`, and the JSON beside it, from the files that its steps left."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from sft_recipes.evaluation.metrics import METRICS
from sft_recipes.evaluation.samples import read_samples
from sft_recipes.report.number_texts import format_estimate
from sft_recipes.statistics import Estimate, paired_difference, proportion_of

Row = Mapping[str, Any]
TITLES = {"smollm2-135m": "SmolLM2-135M-Instruct", "gemma-3-270m": "Gemma-3-270m (the base)"}
BASE_WAYS = {
    "": "base, as it came",
    "first_answer": "base, first answer",
    "shots": "base, {shots} shots",
    "shots/first_answer": "base, {shots} shots, first answer",
}
KINDS = {"lora": "tuned, LoRA", "full": "tuned, full"}
COLUMNS = {
    "exact_match": "exact match, trained families",
    "held_out": "exact match, held-out families",
    "eos": "ended by itself",
    "well_formed": "well formed",
    "constraints": "constraints kept",
}


@dataclass(frozen=True)
class System:
    """One way of answering the test rows; of several seeds each value is the mean of their rows."""

    name: str
    rows_by_seed: Sequence[Sequence[Row]]
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
        return self.work / "lora-1" / "evaluations" / "test"

    def held_out(self) -> list[str]:
        """The families that no training row shows."""
        tasks = read_json(self.first / "metrics.json")["task_differences"]
        return [name for name, task in tasks.items() if task["training_rows"] == 0]

    def systems(self) -> Iterator[System]:
        """The base in every way it was asked, then the tuned models."""
        held_out = self.held_out()
        shots = read_json(self.first / "metrics.json")["prompting"].get("shots", {}).get("shots")
        for folder, name in BASE_WAYS.items():
            if (self.first / "base" / folder / "samples.jsonl").is_file():
                yield System(
                    name.format(shots=shots), [read_rows(self.first / "base" / folder, held_out)]
                )
        for kind, name in KINDS.items():
            runs = sorted(self.work.glob(f"{kind}-[0-9]"))
            answered = [run / "evaluations" / "test" for run in runs]
            rows = [
                read_rows(folder, held_out)
                for folder in answered
                if (folder / "samples.jsonl").is_file()
            ]
            if rows:
                seconds = [self.seconds(f"train-{run.name}") for run in runs]
                yield System(f"{name}, {len(rows)} seeds", rows, fmean(seconds) / 60)

    def seconds(self, step: str) -> float:
        """How long a step took."""
        return float(read_json(self.work / f"{step}.json")["seconds"])

    def loss(self, name: str) -> float:
        """The loss of a model on the validation split."""
        return float(read_json(self.work / f"loss-{name}.json")["printed"]["loss"])


def estimate_text(estimate: Estimate, sign: str = "") -> str:
    """Value and interval as the terminal prints them."""
    return format_estimate(estimate.as_json(), sign)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def systems_table(systems: Sequence[System]) -> str:
    """A line a system."""
    lines = []
    for system in systems:
        cells = [estimate_text(estimate) for estimate in system.estimates().values()]
        minutes = "" if system.minutes is None else f"{system.minutes:.1f}"
        ratio = system.length_ratio()
        lines.append([system.name, *cells, "" if ratio is None else f"{ratio:.2f}", minutes])
    return table(["", *COLUMNS.values(), "length ratio", "minutes to train"], lines)


def families_table(systems: Sequence[System], held_out: Sequence[str]) -> str:
    """Exact match by family, the held-out ones last."""
    by_family = [system.by_family() for system in systems]
    families = sorted(by_family[0], key=lambda name: name in held_out)
    lines = []
    for family in families:
        shown = f"{family} (held out)" if family in held_out else family
        lines.append([shown, *(f"{values[family]:.2f}" for values in by_family)])
    return table(["exact match", *(system.name for system in systems)], lines)


def differences(systems: Sequence[System]) -> list[str]:
    """The tuned models less the best way of asking the base, and LoRA less full, by prompt."""
    ways = [system for system in systems if system.minutes is None]
    tuned = [system for system in systems if system.minutes is not None]
    best = max(ways, key=lambda system: fmean(system.values("exact_match")))
    pairs = [(system, best) for system in tuned]
    if len(tuned) == len(KINDS):
        pairs.append((tuned[0], tuned[1]))
    lines = []
    for system, other in pairs:
        difference = paired_difference(other.values("exact_match"), system.values("exact_match"))
        lines.append(f"- {system.name}, less {other.name}: {estimate_text(difference, '+')}")
    return lines


def trl_table(results: Results) -> str:
    """Ours and stock TRL after the same number of steps, and the paired difference."""
    folders = {
        "ours-same-steps": results.work / "ours-same-steps" / "evaluations" / "test",
        "stock-trl": Path(read_json(results.work / "evaluate-stock-trl.json")["printed"]["folder"]),
    }
    lines = []
    values = {}
    for name, folder in folders.items():
        rows = read_rows(folder, results.held_out())
        values[name] = [float(row["exact_match"]) for row in rows]
        exact = proportion_of(values[name])
        ended = proportion_of([float(row["eos"]) for row in rows])
        minutes = results.seconds(f"train-{name}") / 60
        cells = [
            f"{results.loss(name):.3f}",
            estimate_text(exact),
            estimate_text(ended),
            f"{minutes:.1f}",
        ]
        lines.append([name.replace("-", " "), *cells])
    difference = paired_difference(values["stock-trl"], values["ours-same-steps"])
    head = ["", "held-out loss", "exact match, all families", "ended by itself", "minutes"]
    return (
        table(head, lines)
        + f"\n\nExact match, ours less TRL, paired: {estimate_text(difference, '+')}."
    )


def model_section(name: str, results: Results) -> str:
    """Everything of one model."""
    systems = list(results.systems())
    parts = [
        f"## {TITLES[name]}",
        systems_table(systems),
        "Exact match over all families, paired by prompt:",
        "\n".join(differences(systems)),
        families_table(systems, results.held_out()),
    ]
    if (results.work / "evaluate-ours-same-steps.json").is_file():
        parts += ["### Beside stock TRL", trl_table(results)]
    if (results.work / "evaluate-t0.json").is_file():
        parts += ["### Short rows of T0", t0_table(results)]
    return "\n\n".join(parts)


def t0_table(results: Results) -> str:
    """The base in its ways and the tuned model on somebody's own rows."""
    content = read_json(results.work / "evaluate-t0.json")["printed"]
    shown = ("exact_match", "token_f1", "eos_rate")
    lines = []
    for system in [
        *content["comparisons"],
        {"name": "tuned, LoRA as `init` writes it", "metrics": content["metrics"]},
    ]:
        lines.append(
            [system["name"], *(format_estimate(system["metrics"][name]) for name in shown)]
        )
    return table(["", *(METRICS[name].label for name in shown)], lines)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
    names = ("torch", "transformers", "trl", "peft")
    return {
        "cpu": cpu,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


HEAD = """# Results on real weights

Written by `python -m benchmarks.real_models` (JSON beside it: [results.json](results.json)); each figure is of the
commands that it ran. {rows} test rows of {families} families ({held_out} of them in no training row), greedy answers of
at most 64 tokens, 95 % intervals over prompts; of several seeds a prompt counts once, with the mean of its answers.
Weights are 4-bit files of the published models unpacked to bfloat16, so figures are of those, not of the published
weights. Measured on {machine}.

"First answer": what a base wrote before it went on with a section of its own making. Shots: how many training rows
stand in front of each prompt was chosen among 0, 2, 4 and 8 on training rows."""


def write_page(page: Path, works: Mapping[str, Path]) -> None:
    """Write the page and its JSON."""
    results = {name: Results(work) for name, work in works.items()}
    first = next(iter(results.values()))
    systems = next(first.systems())
    families = systems.by_family()
    here = machine()
    head = HEAD.format(
        rows=len(systems.rows_by_seed[0]),
        families=len(families),
        held_out=len(first.held_out()),
        machine=", ".join(f"{key} {value}" for key, value in here.items()),
    )
    sections = [model_section(name, result) for name, result in results.items()]
    page.write_text("\n\n".join([head, *sections]) + "\n", encoding="utf-8")
    content: dict[str, Any] = {"machine": here, "models": {}}
    for name, result in results.items():
        content["models"][name] = [
            {
                "system": system.name,
                "seeds": len(system.rows_by_seed),
                "minutes": system.minutes,
                "length_ratio": system.length_ratio(),
                "families": system.by_family(),
                **{key: asdict(estimate) for key, estimate in system.estimates().items()},
            }
            for system in result.systems()
        ]
    page.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
