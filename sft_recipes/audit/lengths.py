"""How long rows are, in words and in the run's own tokens, and what each `max_length` costs."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sft_recipes.audit.finding import AuditRow, ProgressBar, excerpt
from sft_recipes.data.labels import IGNORE_INDEX, DroppedRow, Labeller
from sft_recipes.data.template_trial import RowBlame
from sft_recipes.data.workers import Workers
from sft_recipes.messages import Example

Numbers = npt.NDArray[np.int64]
CANDIDATE_LENGTHS = (256, 512, 1024, 2048, 4096)
# A max_length fits if it loses less than this share of the rows.
ACCEPTED_LOSS = 0.01
_BINS = 40
_POINTS = 500
_EXTREMES = 5
_SHOWN_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class UnlabelledRow:
    """A row, by its position, or a part of it, that cannot be labelled, and why."""

    position: int
    loss: DroppedRow


@dataclass(frozen=True, slots=True)
class TokenLengths:
    """Lengths of all training rows; a conversation with a row for each turn has several.

    `row[k]`: position of the input row; `total[k]`, `trained[k]`: tokens; `masks[k]`:
    `(total[k],)`, which are trained.
    """

    row: Numbers
    total: Numbers
    trained: Numbers
    masks: Sequence[npt.NDArray[np.bool_]]
    dropped: Sequence[UnlabelledRow] = ()


def measure_tokens(
    labeller: Labeller, rows: Sequence[AuditRow], bar: ProgressBar, batch_size: int = 1000
) -> TokenLengths:
    """Label every row, in batches, with the tokenizer and template of the run.

    `bar` is told of each batch. The labeller must not drop long rows (`max_length=None`).
    """
    positions: list[int] = []
    total: list[int] = []
    trained: list[int] = []
    masks: list[npt.NDArray[np.bool_]] = []
    dropped: list[UnlabelledRow] = []
    labelled_batches = Workers(labeller.label, blame=RowBlame(labeller)).map(
        _batches(rows, batch_size)
    )
    for number, (examples, batch) in enumerate(labelled_batches):
        first = number * batch_size
        for row in batch.rows:
            mask = np.array(row.labels) != IGNORE_INDEX
            positions.append(first + row.example)
            total.append(len(mask))
            trained.append(int(np.count_nonzero(mask)))
            masks.append(mask)
        for loss in batch.dropped:
            dropped.append(UnlabelledRow(first + loss.example, loss))
        bar.update(len(examples))
    return TokenLengths(
        row=np.array(positions, dtype=np.int64),
        total=np.array(total, dtype=np.int64),
        trained=np.array(trained, dtype=np.int64),
        masks=masks,
        dropped=dropped,
    )


def _batches(rows: Sequence[AuditRow], size: int) -> Iterator[list[Example]]:
    for first in range(0, len(rows), size):
        yield [row.example for row in rows[first : first + size]]


def forecast(tokens: TokenLengths, lengths: Iterable[int]) -> list[dict[str, Any]]:
    """What each `max_length` costs, in input rows and in trained tokens.

    `rows_cut` are longer. TRL cuts them: `answers_lost` keep no trained token,
    `trained_tokens_lost` lie behind the cut and are `share` of all. With `overlength: drop` this
    project drops them whole: `trained_tokens_dropped`.
    """
    return [_cost(tokens, length) for length in lengths]


def _cost(tokens: TokenLengths, length: int) -> dict[str, Any]:
    trained_in_all = max(int(tokens.trained.sum()), 1)
    cut = np.flatnonzero(tokens.total > length)
    trained_left = np.zeros(len(cut), dtype=np.int64)
    for place, row in enumerate(cut.tolist()):
        trained_left[place] = np.count_nonzero(tokens.masks[row][:length])
    dropped = int(tokens.trained[cut].sum())
    lost = dropped - int(trained_left.sum())
    without_answer = cut[trained_left == 0]
    return {
        "max_length": length,
        "rows_cut": len(np.unique(tokens.row[cut])),
        "answers_lost": len(np.unique(tokens.row[without_answer])),
        "trained_tokens_lost": lost,
        "share": lost / trained_in_all,
        "trained_tokens_dropped": dropped,
        "share_dropped": dropped / trained_in_all,
    }


def smallest_fitting(tokens: TokenLengths) -> int:
    """The smallest `max_length` that loses less than 1 % of the training rows."""
    longest_first = np.sort(tokens.total)[::-1]
    lost = int(np.ceil(ACCEPTED_LOSS * len(longest_first))) - 1
    return int(longest_first[max(lost, 0)])


def advice(tokens: TokenLengths, limit: int) -> str:
    """What to do about rows longer than `limit`, with the lengths that would help."""
    fitting = smallest_fitting(tokens)
    longest = int(tokens.total.max())
    if fitting > limit and fitting < longest:
        return (
            f"Raise max_length to {fitting} (loses less than 1 % of the rows) or {longest} "
            "(loses none), or shorten the rows."
        )
    return f"Shorten the rows, leave them out, or raise max_length to {longest} (loses none)."


def summarise_lengths(rows: Sequence[AuditRow], tokens: TokenLengths | None) -> dict[str, Any]:
    """Histograms (logarithmic edges) and quantiles of every length, turns, and extreme rows.

    `points`: prompt and response of at most 500 rows drawn by seed, in `unit`, tokens if known,
    else words.
    """
    prompt_words = _count_words(row.prompt for row in rows)
    response_words = _count_words(row.response for row in rows)
    columns: dict[str, Numbers] = {
        "prompt_words": prompt_words,
        "response_words": response_words,
    }
    unit = "words"
    if tokens is not None:
        unit = "tokens"
        columns["prompt_tokens"] = tokens.total - tokens.trained
        columns["response_tokens"] = tokens.trained
        columns["total_tokens"] = tokens.total
    content: dict[str, Any] = {}
    for name, column in columns.items():
        content[name] = _distribution(column)
    content["unit"] = unit
    content["points"] = _points(columns[f"prompt_{unit}"], columns[f"response_{unit}"])
    content["turns"] = _turn_counts(rows)
    by_length = np.argsort(prompt_words + response_words, kind="stable").tolist()
    content["shortest"] = _shown(rows, by_length[:_EXTREMES])
    content["longest"] = _shown(rows, by_length[::-1][:_EXTREMES])
    return content


def _count_words(texts: Iterable[str]) -> Numbers:
    return np.array([len(text.split()) for text in texts], dtype=np.int64)


def _points(prompts: Numbers, responses: Numbers) -> list[list[int]]:
    both = np.stack([prompts, responses], axis=1)
    order = np.random.default_rng(0).permutation(len(both))
    drawn = np.sort(order[:_POINTS])
    points: list[list[int]] = both[drawn].tolist()
    return points


def _turn_counts(rows: Sequence[AuditRow]) -> dict[str, int]:
    """How many rows have one answer, two answers, and so on."""
    counts: Counter[int] = Counter()
    for row in rows:
        roles = Counter(turn.role for turn in row.turns)
        counts[roles["assistant"]] += 1
    return {str(answers): counts[answers] for answers in sorted(counts)}


def _shown(rows: Sequence[AuditRow], positions: Iterable[int]) -> list[dict[str, Any]]:
    shown = []
    for position in positions:
        row = rows[position]
        entry = {
            "where": row.where,
            "prompt_words": len(row.prompt.split()),
            "response_words": len(row.response.split()),
            "prompt": excerpt(row.prompt, _SHOWN_CHARACTERS),
            "response": excerpt(row.response, _SHOWN_CHARACTERS),
        }
        shown.append(entry)
    return shown


def _distribution(values: Numbers) -> dict[str, Any]:
    lowest = int(values.min())
    highest = int(values.max())
    low = max(lowest, 1)
    high = max(highest + 1, low + 1)
    spaced = np.geomspace(low, high, _BINS + 1)
    edges = np.unique(spaced.round().astype(np.int64))
    # Zero has no place on a logarithmic scale; it counts in the first bin.
    edges[0] = lowest
    counts, _ = np.histogram(values, edges)
    median, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99]).tolist()
    return {
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "min": lowest,
        "median": median,
        "mean": float(values.mean()),
        "p90": p90,
        "p99": p99,
        "max": highest,
    }
