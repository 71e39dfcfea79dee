"""The results page of `benchmarks.real_models`, and the JSON beside it, from the files that its steps left."""

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.real_models_results import KINDS, Results, System, read_json, read_rows
from sft_recipes.evaluation.metrics import METRICS
from sft_recipes.report.number_texts import format_estimate
from sft_recipes.statistics import Estimate, paired_difference, proportion_of

TITLES = {"smollm2-135m": "SmolLM2-135M-Instruct", "gemma-3-270m": "Gemma-3-270m (the base)"}
COLUMNS = {
    "exact_match": "exact match, trained families",
    "held_out": "exact match, held-out families",
    "eos": "ended by itself",
    "well_formed": "well formed",
    "constraints": "constraints kept",
}


def estimate_text(estimate: Estimate, sign: str = "") -> str:
    """Value and interval as the terminal prints them."""
    return format_estimate(estimate.as_json(), sign)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def systems_table(systems: Sequence[System]) -> str:
    """A line a system; minutes only where no run shared the machine with another."""
    head = ["", *COLUMNS.values(), "length ratio"]
    timed = any(system.minutes is not None for system in systems)
    lines = []
    for system in systems:
        ratio = system.length_ratio()
        cells = [estimate_text(estimate) for estimate in system.estimates().values()]
        cells.append("" if ratio is None else f"{ratio:.2f}")
        if timed:
            cells.append("" if system.minutes is None else f"{system.minutes:.1f}")
        lines.append([system.name, *cells])
    return table([*head, "minutes to train"] if timed else head, lines)


def families_table(systems: Sequence[System], held_out: Sequence[str]) -> str:
    """Exact match by family, the held-out ones last."""
    by_family = [system.by_family() for system in systems]
    families = sorted(by_family[0], key=lambda name: name in held_out)
    lines = []
    for family in families:
        name = family.replace("_", " ")
        shown = f"{name} (held out)" if family in held_out else name
        lines.append([shown, *(f"{values[family]:.2f}" for values in by_family)])
    return table(["exact match", *(system.name for system in systems)], lines)


def differences(systems: Sequence[System]) -> list[str]:
    """The tuned models less the best way of asking the base, and LoRA less full, by prompt."""
    ways = [system for system in systems if not system.is_tuned]
    tuned = [system for system in systems if system.is_tuned]
    pairs = []
    if ways:
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
    lines = []
    values = {}
    seconds = {}
    for name, shown in (("ours-same-steps", "ours"), ("stock-trl", "stock TRL")):
        rows = read_rows(results.answers(name), results.held_out())
        values[name] = [float(row["exact_match"]) for row in rows]
        exact = proportion_of(values[name])
        ended = proportion_of([float(row["eos"]) for row in rows])
        step = read_json(results.work / f"train-{name}.json")
        cells = [
            f"{results.loss(name):.3f}",
            estimate_text(exact),
            estimate_text(ended),
            f"{step['seconds'] / 60:.1f}",
            f"{step['peak_bytes'] / 2**30:.1f} GiB",
        ]
        seconds[name] = step["seconds"]
        lines.append([shown, *cells])
    difference = paired_difference(values["stock-trl"], values["ours-same-steps"])
    head = ["", "held-out loss", "exact match, all families", "ended by itself", "minutes"]
    steps = step["command"].partition("--max_steps ")[2].split()[0]
    faster = seconds["stock-trl"] / seconds["ours-same-steps"]
    return (
        f"{steps} steps of LoRA on the same rows at the same learning rate and schedule, under bf16; everything else "
        f"of TRL's run is its default. {len(rows)} test rows; minutes with start and preparation.\n\n"
        f"{table([*head, 'peak memory of the process'], lines)}\n\n"
        f"Exact match, ours less TRL, paired: {estimate_text(difference, '+')}. Ours took 1/{faster:.1f} of the time."
    )


def t0_table(results: Results) -> str:
    """The base in its ways and the tuned model on somebody's own rows."""
    content = read_json(results.work / "evaluate-t0.json")["printed"]
    shown = ("exact_match", "token_f1", "eos_rate")
    tuned = {"name": "tuned, LoRA as `init` writes it", "metrics": content["metrics"]}
    lines = []
    for system in [*content["comparisons"], tuned]:
        cells = [format_estimate(system["metrics"][name]) for name in shown]
        lines.append([system["name"], *cells])
    return table(["", *(METRICS[name].label for name in shown)], lines)


def rates_table(results: Results) -> str:
    """What was tried on the validation split, one seed each; nothing where no rate was."""
    parts = []
    for kind, name in KINDS.items():
        tried = results.rates(kind)
        if tried:
            values = tried.values()
            exact = [f"{value['exact_match']:.3f}" for value in values]
            loss = [f"{value['loss']:.3f}" for value in values]
            lines = [["exact match", *exact], ["loss", *loss]]
            parts.append(table([f"{name}, learning rate", *tried], lines))
    return "\n\n".join(parts)


def forgetting_table(results: Results) -> str:
    """General prompts passed before and after tuning, without replay and with it; nothing where never asked."""
    without, mixed = results.retention("lora"), results.retention("replay")
    if without is None or mixed is None:
        return ""
    lines = [["before tuning", estimate_text(proportion_of(without.before)), "", ""]]
    for name, one in (("tuned", without), ("tuned, replay mixed in", mixed)):
        cells = [
            estimate_text(proportion_of(one.after)),
            estimate_text(paired_difference(one.before, one.after), "+"),
            estimate_text(proportion_of(one.task.values("exact_match"))),
        ]
        lines.append([f"{name}, {len(one.task.rows_by_seed)} seeds", *cells])
    head = ["", "general prompts passed", "less before, paired", "exact match of the task"]
    account = read_json(results.work / "replay.json")["printed"]
    rows, asked = account["asked"]["written"], sum(account["asked"].values())
    between = paired_difference(without.after, mixed.after)
    exact = [one.task.values("exact_match") for one in (without, mixed)]
    task = paired_difference(*exact)
    return (
        f"{table(head, lines)}\n\nWith replay less without, paired: general prompts {estimate_text(between, '+')}, "
        f"exact match of the task {estimate_text(task, '+')}. Mixed in were {rows} rows that the model wrote itself "
        f"before it was tuned, to {asked} prompts; the other answers did not end within their budget or looped."
    )


def sections(results: Results) -> Iterator[str]:
    """Everything of one model on one machine."""
    systems = list(results.systems())
    if systems:
        yield systems_table(systems)
        yield "Exact match over all families, paired by prompt:"
        yield "\n".join(differences(systems))
        yield families_table(systems, results.held_out())
    optional = {
        "### Learning rates": rates_table(results),
        "### What was forgotten": forgetting_table(results),
    }
    if results.is_evaluated("ours-same-steps"):
        optional["### Beside stock TRL"] = trl_table(results)
    if results.is_evaluated("t0"):
        optional["### Short rows of T0"] = t0_table(results)
    for title, text in optional.items():
        if text:
            yield f"{title}\n\n{text}"


def machine() -> dict[str, Any]:
    """What figures of this process are measured on."""
    names = ("torch", "transformers", "trl", "peft")
    cpu = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
    on_cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name(0) if on_cuda else f"{torch.get_num_threads()} cores, {cpu}"
    versions = {name: version(name) for name in names}
    return {"device": device, "python": platform.python_version(), **versions}


def machine_text(folder: Path) -> str:
    """The machine of a folder of results in words."""
    content = read_json(folder / "machine.json")
    jobs, device = content.pop("jobs"), content.pop("device")
    versions = ", ".join(f"{key} {value}" for key, value in content.items())
    return f"Measured on {device} ({versions}), {jobs} run{'s' * (jobs > 1)} at a time."


HEAD = """# Results on real weights

Written by `python -m benchmarks.real_models` (JSON beside it: [results.json](results.json)); each figure is of the
commands that it ran. Greedy answers of at most 64 tokens to rows of the test split, 95 % intervals over prompts; of
several seeds a prompt counts once, with the mean of its answers. Held-out families are in no training row. Weights are
4-bit files of the published models unpacked to bfloat16, so figures are of those, not of the published weights.

"First answer": what a base wrote before it went on with a section of its own making. Shots: how many training rows
stand in front of each prompt was chosen among 0, 2, 4 and 8 on training rows."""


def write_page(page: Path, works: Sequence[Path]) -> None:
    """Write the page and its JSON, from the folders of one or more machines."""
    parts = [HEAD]
    content: dict[str, Any] = {}
    for work in works:
        for recipe, title in TITLES.items():
            results = Results(work / recipe)
            if list(results.work.glob("evaluate-*.json")):
                parts += [f"## {title}", machine_text(work), *sections(results)]
                device = read_json(work / "machine.json")["device"]
                content.setdefault(device, {})[recipe] = as_json(results)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    page.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def as_json(results: Results) -> dict[str, Any]:
    """The systems with their intervals, and the learning rates."""
    rows = []
    for system in results.systems():
        estimates = {key: asdict(estimate) for key, estimate in system.estimates().items()}
        own = {
            "system": system.name,
            "seeds": len(system.rows_by_seed),
            "minutes": system.minutes,
            "length_ratio": system.length_ratio(),
            "families": system.by_family(),
        }
        rows.append({**own, **estimates})
    return {"systems": rows, "rates": {kind: results.rates(kind) for kind in KINDS}}
