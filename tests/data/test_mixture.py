"""Which rows are trained and which are held out: seeded, exact in number, rows with one prompt never straddling."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sft_recipes.data.mixture import mix
from sft_recipes.data.prompt_groups import (
    join_near_duplicates,
    joined_groups,
    prompt_group,
    prompt_text,
)
from sft_recipes.data.splits import split_eval
from sft_recipes.errors import InputError
from sft_recipes.messages import Example
from sft_recipes.recipe import DatasetSource
from sft_recipes.recipe_keys import make_recipe


def chat(question: str, answer: str = "x") -> Example:
    """A one-turn example."""
    return Example(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "s", 0
    )


def groups_of(count: int, repeats: int = 1, seed: int = 42) -> np.ndarray:
    """Groups of `count` prompts, each standing `repeats` times."""
    return np.array(
        [
            prompt_group(prompt_text(chat(f"question {index // repeats}")), seed)
            for index in range(count)
        ]
    )


def test_group_is_the_prompt() -> None:
    """Answers, case, spacing and Unicode forms make no other group; words, system prompt and seed do."""
    asked = [chat("What is ﬁve?", "5"), chat("  what IS\nfive? ", "6")]
    same = {prompt_group(prompt_text(example), 1) for example in asked}
    assert len(same) == 1
    assert prompt_group(prompt_text(chat("what is six?")), 1) not in same
    assert prompt_group(prompt_text(chat("what is five?")), 2) not in same
    system = Example(
        [{"role": "system", "content": "Be brief."}, *chat("what is five?").messages], "s", 0
    )
    assert prompt_group(prompt_text(system), 1) not in same
    assert prompt_text(Example([], "s", 0, text="A b")) == prompt_text(
        Example([], "s", 9, text="a  B")
    )


@pytest.mark.parametrize(
    ("eval_split", "expected"), [(0.25, 25), (10, 10), (1, 1), (0.0, 0), (100, 100)]
)
def test_split_size(eval_split: float, expected: int) -> None:
    """Below 1 it is a share, from 1 on a count; every row is on exactly one side."""
    train, held_out = split_eval(groups_of(100), eval_split)
    assert len(held_out) == expected
    assert sorted([*train, *held_out]) == list(range(100))


def test_split_is_seeded() -> None:
    """The same seed draws the same rows, another seed others, and a row's own place in the file does not matter."""
    first = split_eval(groups_of(200), 40)[1].tolist()
    assert first == split_eval(groups_of(200), 40)[1].tolist()
    assert first != split_eval(groups_of(200, seed=7), 40)[1].tolist()
    assert first != list(range(40))
    backwards = split_eval(groups_of(200)[::-1].copy(), 40)[1]
    assert sorted(199 - backwards) == first


def test_groups_never_straddle() -> None:
    """Rows with the same prompt are all held out or all trained."""
    groups = groups_of(300, repeats=3)
    train, held_out = split_eval(groups, 61)
    assert not set(groups[train]) & set(groups[held_out])
    assert len(held_out) == 63, "the group that reaches the count is held out as a whole"


def rows_by_source(*counts: int) -> np.ndarray:
    """Source numbers of rows: `counts[i]` rows of source i."""
    return np.repeat(np.arange(len(counts)), counts)


def test_weight_repeats_exactly() -> None:
    """weight 2.5 over 10 rows: every row twice, five of them three times; weight 0.3: three rows once."""
    sources = [DatasetSource("a", weight=2.5), DatasetSource("b", weight=0.3), DatasetSource("c")]
    of_row = rows_by_source(10, 10, 4)
    chosen = mix(sources, of_row, 42, None)
    counts = Counter(chosen.tolist())
    assert sorted(counts[row] for row in range(10)) == [2] * 5 + [3] * 5
    assert (
        sum(counts[row] for row in range(10, 20)) == 3
        and max(counts[row] for row in range(10, 20)) == 1
    )
    assert all(counts[row] == 1 for row in range(20, 24))
    assert chosen.tolist() == mix(sources, of_row, 42, None).tolist()
    assert chosen.tolist() != mix(sources, of_row, 43, None).tolist()


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (3, 1), (0.0, 1.0)])
def test_fraction_is_the_share_of_the_mixture(fractions: tuple[float, float]) -> None:
    """The mixture has the asked shares, is as large as the smallest source allows, and repeats nothing."""
    sources = [DatasetSource("a", fraction=fractions[0]), DatasetSource("b", fraction=fractions[1])]
    chosen = mix(sources, rows_by_source(60, 40), 42, None)
    expected = {(0.5, 0.5): (40, 40), (3, 1): (60, 20), (0.0, 1.0): (0, 40)}[fractions]
    assert ((chosen < 60).sum(), (chosen >= 60).sum()) == expected
    assert len(set(chosen.tolist())) == len(chosen)
    if 0 < expected[1] < 40:
        assert set(chosen[chosen >= 60]) != set(range(60, 60 + expected[1])), (
            "the first rows were taken, not a draw"
        )


def test_max_rows_draws_from_all() -> None:
    """max_rows takes exactly that many rows of the mixture, from all of it, seeded; more changes nothing."""
    sources = [DatasetSource("a"), DatasetSource("b")]
    of_row = rows_by_source(50, 50)
    chosen = mix(sources, of_row, 42, 20)
    assert len(chosen) == 20 == len(set(chosen.tolist()))
    assert chosen.min() < 50 <= chosen.max()
    assert (
        chosen.tolist()
        == mix(sources, of_row, 42, 20).tolist()
        != mix(sources, of_row, 1, 20).tolist()
    )
    assert mix(sources, of_row, 42, 1000).tolist() == list(range(100))


def test_near_duplicates_are_one_group_however_long_the_chain() -> None:
    """Each prompt is a near-duplicate of the next but not of the last: all of them join the smallest group; prompts
    that differ in their numbers, and unrelated ones, stay alone.
    """
    sentence = (
        "Please explain in a few words why the sky over the sea looks blue on a clear summer day"
    )
    chain = [sentence, sentence + " to me", sentence + " to me and to my friends", "Add 3 and 4, then halve it.",
             "Add 5 and 9, then halve it.", "Name a bird."]  # fmt: skip
    groups = np.array([70, 20, 90, 5, 6, 7])
    joined = join_near_duplicates(groups, chain)
    assert joined.tolist() == [[70, 20], [90, 20]]
    assert joined_groups(groups, joined).tolist() == [20, 20, 20, 5, 6, 7]
    nothing = join_near_duplicates(np.empty(0, dtype=np.int64), [])
    assert joined_groups(groups, nothing).tolist() == groups.tolist()


def test_a_group_that_would_be_most_of_the_evaluation_stays_in_train() -> None:
    """A cluster of more than half the rows wanted is not held out while smaller groups are there."""
    groups = np.array([1] * 60 + list(range(100, 140)))
    train, held_out = split_eval(groups, 10)
    assert len(held_out) == 10 and not set(groups[held_out]) & set(groups[train])
    assert 1 not in groups[held_out]
    assert len(split_eval(np.array([1] * 60), 10)[1]) == 60


def test_rows_of_another_set_are_held_out_only_with_their_prompt() -> None:
    """Share and draw are of the marked rows; a row beside them goes along with its group alone."""
    groups = np.array([*range(100), *range(1000, 1100), 0])
    drawn_from = np.arange(201) < 100
    train, held_out = split_eval(groups, 0.1, drawn_from)
    assert groups[held_out].tolist() == [*range(10), 0]
    assert sorted([*train, *held_out]) == list(range(201))
    assert len(split_eval(groups, 0.1, np.zeros(201, dtype=bool))[1]) == 0


def test_something_has_to_be_held_out() -> None:
    """`held_out: false` for every set is refused; rows that are only evaluated know no such key."""
    values = {"model_name_or_path": "m", "output_dir": "o", "eval_split": 0.1}
    apart = {"path": "b.jsonl", "held_out": False}
    recipe = make_recipe({**values, "datasets": [{"path": "a.jsonl"}, apart]})
    assert [source.held_out for source in recipe.data.datasets] == [True, False]
    with pytest.raises(InputError, match="held_out: false for every data set"):
        make_recipe({**values, "datasets": [apart]})
    with pytest.raises(InputError, match=r"evaluation\.data\.held_out"):
        make_recipe({**values, "dataset_name": "a.jsonl", "evaluation": {"data": apart}})
