"""How long rows are, in words and in the run's own tokens, and what each `max_length` would cost."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sft_recipes.audit.finding import AuditRow, excerpt
from sft_recipes.data.labels import IGNORE_INDEX, DroppedRow, Labeller
from sft_recipes.data.workers import Workers

Numbers = npt.NDArray[np.int64]
CANDIDATE_LENGTHS = (256, 512, 1024, 2048, 4096)
# A max_length fits if it loses less than this share of the rows.
ACCEPTED_LOSS = 0.01
_BINS, _POINTS, _EXTREMES, _SHOWN_CHARACTERS, _BATCH = 40, 500, 5, 300, 1000


@dataclass(frozen=True, slots=True)
class TokenLengths:
    """Lengths of all training rows; a conversation whose turns become rows of their own has several.

    `row[k]`: position of the input row; `total[k]`, `trained[k]`: tokens; `masks[k]`: `(total[k],)`, which are trained.
    `dropped`: (position, why) of rows that cannot be labelled.
    """

    row: Numbers
    total: Numbers
    trained: Numbers
    masks: Sequence[npt.NDArray[np.bool_]]
    dropped: Sequence[tuple[int, DroppedRow]] = ()


def measure_tokens(labeller: Labeller, rows: Sequence[AuditRow], bar: Any) -> TokenLengths:
    """Label every row, in batches, with the tokenizer and template of the run. `bar.update(n)` is told of progress.

    The labeller must not drop long rows (`max_length=None`).
    """
    at, masks, dropped = list[int](), list[npt.NDArray[np.bool_]](), list[tuple[int, DroppedRow]]()
    batches = (
        [row.example for row in rows[first : first + _BATCH]]
        for first in range(0, len(rows), _BATCH)
    )
    for number, (examples, batch) in enumerate(Workers(labeller.label).map(batches)):
        at += [number * _BATCH + row.example for row in batch.rows]
        masks += [np.array(row.labels) != IGNORE_INDEX for row in batch.rows]
        dropped += [(number * _BATCH + lost.example, lost) for lost in batch.dropped]
        bar.update(len(examples))
    total, trained = (
        np.array([count(mask) for mask in masks], dtype=np.int64)
        for count in (len, np.count_nonzero)
    )
    return TokenLengths(np.array(at, dtype=np.int64), total, trained, masks, dropped)


def forecast(tokens: TokenLengths, lengths: Iterable[int]) -> list[dict[str, Any]]:
    """What each `max_length` costs, in input rows and in trained tokens.

    `rows_cut` are longer. TRL cuts them: `answers_lost` keep no trained token, `trained_tokens_lost` lie behind the
    cut and are `share` of all. With `overlength: drop` this project drops them whole: `trained_tokens_dropped`.
    """
    everything, table = max(int(tokens.trained.sum()), 1), []
    for length in lengths:
        cut = np.flatnonzero(tokens.total > length)
        left = np.array(
            [np.count_nonzero(tokens.masks[at][:length]) for at in cut.tolist()], dtype=np.int64
        )
        dropped, lost = int(tokens.trained[cut].sum()), int((tokens.trained[cut] - left).sum())
        rows_cut, answers_lost = (
            len(np.unique(tokens.row[some])) for some in (cut, cut[left == 0])
        )
        costs: dict[str, Any] = {
            "max_length": length,
            "rows_cut": rows_cut,
            "answers_lost": answers_lost,
        }
        costs |= {"trained_tokens_lost": lost, "share": lost / everything}
        table.append(
            costs | {"trained_tokens_dropped": dropped, "share_dropped": dropped / everything}
        )
    return table


def smallest_fitting(tokens: TokenLengths) -> int:
    """The smallest `max_length` that loses less than 1 % of the training rows."""
    longest_first = np.sort(tokens.total)[::-1]
    return int(longest_first[max(int(np.ceil(ACCEPTED_LOSS * len(longest_first))) - 1, 0)])


def summarise_lengths(rows: Sequence[AuditRow], tokens: TokenLengths | None) -> dict[str, Any]:
    """Histograms (logarithmic edges) and quantiles of every length, turns, and the shortest and longest rows.

    `points`: prompt and response of at most 500 rows drawn by seed, in `unit`, tokens if known, else words.
    """
    prompts = np.array([len(row.prompt.split()) for row in rows])
    responses = np.array([len(row.response.split()) for row in rows])
    columns: dict[str, Numbers] = {"prompt_words": prompts, "response_words": responses}
    if tokens is not None:
        columns |= {
            "prompt_tokens": tokens.total - tokens.trained,
            "response_tokens": tokens.trained,
        }
        columns |= {"total_tokens": tokens.total}
    content: dict[str, Any] = {name: _distribution(column) for name, column in columns.items()}
    content["unit"] = unit = "words" if tokens is None else "tokens"
    shape = np.stack([columns[f"prompt_{unit}"], columns[f"response_{unit}"]], axis=1)
    some = np.random.default_rng(0).permutation(len(shape))[:_POINTS]
    content["points"] = shape[np.sort(some)].tolist()
    turns = Counter(sum(role == "assistant" for role, _ in row.turns) for row in rows)
    content["turns"] = {str(count): number for count, number in sorted(turns.items())}
    order = np.argsort(prompts + responses, kind="stable").tolist()
    for name, chosen in {
        "shortest": order[:_EXTREMES],
        "longest": order[: -_EXTREMES - 1 : -1],
    }.items():
        content[name] = [
            {
                "where": rows[at].where,
                "prompt_words": int(prompts[at]),
                "response_words": int(responses[at]),
            }
            | {
                part: excerpt(getattr(rows[at], part), _SHOWN_CHARACTERS)
                for part in ("prompt", "response")
            }
            for at in chosen
        ]
    return content


def _distribution(values: Numbers) -> dict[str, Any]:
    low, high = max(int(values.min()), 1), int(values.max()) + 1
    edges = np.unique(np.geomspace(low, max(high, low + 1), _BINS + 1).round().astype(np.int64))
    edges[0] = values.min()
    median, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99]).tolist()
    numbers = {
        "min": int(values.min()),
        "median": median,
        "mean": float(values.mean()),
        "p90": p90,
        "p99": p99,
    }
    histogram = {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()}
    return {"histogram": histogram, **numbers, "max": int(values.max())}
