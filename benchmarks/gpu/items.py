"""The items, in the order they are run: what a table cannot do without first. No torch here."""

from __future__ import annotations

from benchmarks.gpu.children import Item

# Seconds for all items together; one that begins late gets what is left.
BUDGET_S = 420
# Less than this is not worth a start.
LEAST_S = 10

# Imported once, where children are forked.
PRELOAD = (
    "benchmarks.gpu.runs",
    "benchmarks.gpu.memory",
    "sft_recipes.training.train",
    "sft_recipes.evaluation.generation",
    "peft.tuners.lora",
)


def _item(name: str, title: str, module: str, limit: float) -> Item:
    return Item(name, title, f"benchmarks.gpu.{module}:{name}", limit)


# All limits add up to more than the budget: each leaves room for a slow start, and few need it.
ITEMS = (
    _item("ceilings", "what the device can do: copy and matrix product", "ceilings", 40),
    _item(
        "quickstart",
        "train, stop by signal, resume, evaluate on the command line",
        "quickstart",
        90,
    ),
    _item("padded", "1B full fine-tuning, padded: ours and stock TRL in turns", "full", 70),
    _item("packed", "1B full fine-tuning, packed: sdpa, varlen, flex attention", "full", 100),
    _item("lora", "8B LoRA, packed: tokens a second and MFU", "lora", 80),
    _item("qlora", "8B QLoRA, packed: tokens a second and memory", "lora", 70),
    _item("memory", "the estimate of `check` and the measured peak", "memory", 60),
    _item("profile", "where the time of a step goes", "profile", 40),
    _item("costs", "numpy rows, workers, consumption counting: one off at a time", "costs", 45),
    _item("determinism", "a run twice and resumed: equal weights", "determinism", 40),
    _item("full_determinism", "the same under full_determinism: true", "determinism", 40),
    _item("generation", "greedy answers in batches of three sizes", "generation", 60),
)


def chosen(names: str) -> tuple[Item, ...]:
    """The items of a comma-separated list, in their own order; all if it is empty.

    Raises ValueError for other names.
    """
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    unknown = wanted - {item.name for item in ITEMS}
    if unknown:
        raise ValueError(f"no such item: {', '.join(sorted(unknown))}; --list names them")
    return tuple(item for item in ITEMS if not wanted or item.name in wanted)
