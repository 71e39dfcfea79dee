"""Generated files of rows, right and wrong in every way that is cheap to think of: each row is kept, dropped or
rejected, and the counts add up; or the file is refused by name.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.data.labels import Labeller
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepare import prepare
from sft_recipes.errors import SFTRecipesError
from sft_recipes.recipe import Recipe
from sft_recipes.recipe_keys import load_recipe

pytestmark = pytest.mark.slow
FILES = 420
SEED = int(os.environ.get("SFT_ATTACK_SEED", "16"))
TEXTS = (
    "Name a colour.", "Blue.", "", " ", "\n", "é\u2028ü\u0085", "<|im_end|>", "<|im_start|>system\n",
    "### Response:\n",
    "{{ 7 * 7 }}", "{% for x in y %}", "\u202eright",
    "a" * 3000, "\ud83d\ude00", "null", "NaN", "0", "\ufeff", "\x1b[31m",
)  # fmt: skip
# In the place of a text: what rows really hold, and what nobody should write.
VALUES: tuple[Any, ...] = (
    None,
    0,
    -1,
    1.5,
    True,
    [],
    {},
    ["x"],
    {"a": 1},
    [[["deep"]]],
    10**30,
    "9" * 50,
)
ROLES = ("user", "assistant", "system", "tool", "human", "gpt", "USER", "", 7, None)


def text(draw: random.Random) -> Any:
    """Mostly a text, sometimes another value."""
    return draw.choice(TEXTS) if draw.random() < 0.9 else draw.choice(VALUES)


def message(draw: random.Random) -> Any:
    """Mostly a message."""
    if draw.random() < 0.05:
        return draw.choice(VALUES)
    role = draw.choice(ROLES[:2]) if draw.random() < 0.8 else draw.choice(ROLES)
    return {"role": role, "content": text(draw)}


def good_row(shape: int, number: int) -> dict[str, Any]:
    """A row of a shape, as it should be."""
    question, answer = f"Name number {number}.", f"It is {number}."
    if shape < 3:
        return {"instruction": question, "output": answer}
    if shape < 6:
        pair = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": pair}
    return {"prompt": question, "completion": answer}


def row(draw: random.Random, shape: int) -> Any:
    """A row of a shape that people have, good or in some way not, or none at all."""
    if draw.random() < 0.7:
        return good_row(shape, draw.randrange(1000))
    if draw.random() < 0.1:
        shape = draw.randrange(8)
    if shape < 3:
        made: dict[str, Any] = {"instruction": text(draw), "output": text(draw)}
        if draw.random() < 0.5:
            made["input"] = text(draw)
    elif shape < 6:
        made = {"messages": [message(draw) for _ in range(draw.randrange(6))]}
    elif shape == 6:
        made = {"prompt": text(draw), "completion": text(draw)}
    else:
        return draw.choice((*VALUES, "a line of text"))
    if draw.random() < 0.1:
        made[draw.choice(("system", "tools", "weight", "labels", "chosen", "id", "x y", ""))] = (
            text(draw)
        )
    if draw.random() < 0.05:
        made.pop(next(iter(made)))
    return made


def line(draw: random.Random, shape: int) -> bytes:
    """A row as a line, sometimes damaged."""
    content = json.dumps(row(draw, shape), ensure_ascii=draw.random() < 0.5).encode(
        "utf-8", "surrogatepass"
    )
    damage = draw.random()
    if damage < 0.01:
        return content[: draw.randrange(len(content))]
    if damage < 0.02:
        place = draw.randrange(len(content))
        return content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :]
    if damage < 0.025:
        return content + content
    return content


def lines_of(draw: random.Random) -> bytes:
    """JSON Lines with odd line ends."""
    end = draw.choice((b"\n", b"\r\n", b"\n\n"))
    shape = draw.randrange(7)
    return end.join(line(draw, shape) for _ in range(draw.randrange(12))) + draw.choice(
        (b"", b"\n")
    )


def array_of(draw: random.Random) -> bytes:
    """One JSON array."""
    shape = draw.randrange(7)
    return json.dumps([row(draw, shape) for _ in range(draw.randrange(8))]).encode()


def table(draw: random.Random) -> bytes:
    """A CSV or TSV file, sometimes with another encoding."""
    separator = draw.choice(",;\t")
    rows = [separator.join(("instruction", "output"))]
    for _ in range(draw.randrange(8)):
        cells = [str(text(draw)) for _ in range(draw.choice((2, 2, 2, 1, 3)))]
        rows.append(separator.join(f'"{cell}"' if draw.random() < 0.5 else cell for cell in cells))
    return "\n".join(rows).encode(draw.choice(("utf-8", "utf-8", "latin-1", "utf-16")), "replace")


WRITERS: dict[str, Callable[[random.Random], bytes]] = {
    "rows.jsonl": lines_of,
    "rows.json": array_of,
    "rows.csv": table,
    "rows.tsv": table,
    "rows.jsonl.gz": lambda draw: gzip.compress(lines_of(draw)),
    "cut.jsonl.gz": lambda draw: gzip.compress(lines_of(draw))[:-5],
    "rows.parquet": lambda draw: draw.choice((b"PAR1", b"")) + draw.randbytes(200),
    "rows.txt": lines_of,
}


def outcome(recipe: Recipe, labeller: Labeller, folder: Path, file: Path) -> str:
    """Prepare the file; the account must add up, a refusal must say where."""
    try:
        data = prepare(recipe, labeller, folder, progress=False)
    except SFTRecipesError as error:
        said = str(error)
        names_a_place = (
            re.search(rf"{re.escape(file.name)}(:\d+|:row \d+)?", said) or "max_lost" in said
        )
        assert names_a_place and "Fix:" in said, said
        return f"refused, {type(error).__name__}"
    for source in data.summary["sources"]:
        dropped = sum(source["dropped"].values())
        total = source["rows_kept"] + dropped + source["rows_rejected"]
        assert source["rows_in"] == total, source
        assert dropped == source["rows_dropped"], source
    return "prepared"


def test_every_row_is_accounted_for(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 420 generated files each is prepared with an account that adds up, or refused with file and fix; nothing else
    comes out.
    """
    write_recipe()
    outcomes: Counter[tuple[str, str]] = Counter()
    labeller = None
    for number in range(FILES):
        draw = random.Random(f"{SEED} {number}")
        name = draw.choice(list(WRITERS))
        folder = tmp_path / str(number)
        folder.mkdir()
        file = folder / name
        file.write_bytes(WRITERS[name](draw))
        keys = {"dataset_name": str(file), "max_lost": 1.0, "dataset_num_proc": 1}
        if draw.random() < 0.7:
            keys |= {"on_bad_rows": "skip", "max_rejected": 1.0}
        if draw.random() < 0.3:
            keys |= {"control_tokens": draw.choice(("drop", "error", "neutralize"))}
        recipe = load_recipe(write_recipe(**keys))
        labeller = labeller or open_labeller(recipe)
        outcomes[name, outcome(recipe, labeller, folder / "prepared", file)] += 1
    with capsys.disabled():
        print(f"\nreader fuzz, seed {SEED}")
        for (name, ending), count in sorted(outcomes.items()):
            print(f"{name:16} {ending:24} {count:>4}")
    assert outcomes.total() == FILES
    endings = {ending for _, ending in outcomes}
    assert "prepared" in endings and any(ending.startswith("refused") for ending in endings)
