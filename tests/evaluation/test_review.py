"""Blind review: the page gives nothing away, no text runs in it, and every number of the result is
a known answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from sft_recipes import cli
from sft_recipes.errors import InputError
from sft_recipes.evaluation.review import build, krippendorff_alpha, score
from sft_recipes.evaluation.review_votes import CHOICES, TAGS
from sft_recipes.messages import visible
from sft_recipes.report.review_text import NEEDED_ITEMS

HOSTILE = (
    "</script><script>alert(1)</script>"
    "<img src=x onerror=alert(2)> \u202eevil\u200b \u2028 & \x07 <!-- javascript:"
)


def write_folder(
    folder: Path, answers: Sequence[str], prompts: Sequence[str] | None = None
) -> Path:
    """An evaluation folder with the part of `samples.jsonl` that a review reads."""
    folder.mkdir(parents=True)
    rows = []
    for index, answer in enumerate(answers):
        asked = {"role": "user", "content": prompts[index] if prompts else f"question {index}"}
        messages = [asked, {"role": "assistant", "content": "reference"}]
        rows.append(
            {
                "row": index,
                "source": "secret-source.jsonl",
                "messages": messages,
                "response": answer,
            }
        )
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "samples.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two systems on twelve prompts; the candidate's answer number i is i + 1 times as long as the
    baseline's."""
    tuned = write_folder(
        tmp_path / "wonder-model-tuned", ["y" * (index + 1) for index in range(12)]
    )
    return tuned, write_folder(tmp_path / "wonder-model-base", ["x"] * 12)


@pytest.fixture
def key(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """The sealed key of a page with all twelve prompts."""
    return Path(build(*pair, tmp_path / "page.html")["key"])


def page_data(page: Path) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(
        r'<script id="data" type="application/json">(.*?)</script>', page.read_text("utf-8"), re.S
    )
    assert found
    return json.loads(found[1])


def item_of(key: Path, row: int) -> str:
    """The item of a row of the data."""
    return next(
        item
        for item, sealed in json.loads(key.read_text())["items"].items()
        if sealed["row"] == row
    )


def vote(
    key: Path, row: int, winner: str, *, left: str = "candidate", much: bool = False, **more: Any
) -> dict[str, Any]:
    """A vote as the page exports it: `winner` and `left` are systems, or a choice such as `same`
    for the winner."""
    item = item_of(key, row)
    first = json.loads(key.read_text())["items"][item]["first"]
    side = (
        {left: "left"}.get(winner, "right") + "_much" * much
        if winner in ("candidate", "baseline")
        else winner
    )
    made = {
        "item": item,
        "repeat": False,
        "left": int(first != left),
        "choice": side,
        "comment": "",
    }
    return {**made, "acceptable": [None, None], "tags": [[], []], **more}


def write_votes(key: Path, rater: str, votes: Sequence[Mapping[str, Any]], **changes: Any) -> Path:
    """A file of votes beside the key."""
    page = json.loads(key.read_text())["page"]
    content = {
        "schema_version": 1,
        "kind": "review votes",
        "page": page,
        "rater": rater,
        "votes": votes,
        **changes,
    }
    file = key.with_name(f"votes-{rater}.json")
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


class Tags(HTMLParser):
    """Every start tag of a document with its attributes' names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """Model output and prompts add no element and no attribute to the page; hidden characters are
    spelled."""
    plain = build(
        write_folder(tmp_path / "a", ["one"]),
        write_folder(tmp_path / "b", ["two"]),
        tmp_path / "plain.html",
    )
    c, d = (write_folder(tmp_path / name, [HOSTILE + name], [HOSTILE]) for name in "cd")
    page = Path(build(c, d, tmp_path / "hostile.html")["output"])
    assert (
        Tags(page.read_text("utf-8")).found == Tags(Path(plain["output"]).read_text("utf-8")).found
    )
    item = page_data(page)["items"][0]
    assert item["turns"] == [["user", visible(HOSTILE)]]
    assert sorted(item["answers"]) == [visible(HOSTILE + "c"), visible(HOSTILE + "d")]
    assert "\u202e" not in page.read_text("utf-8") and "⟨U+202E⟩" in item["answers"][0]


def test_page_is_blind_and_loads_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Neither folder, source nor role of a system is in the page; its policy allows its own script
    and style only."""
    text = Path(build(*pair, tmp_path / "page.html")["output"]).read_text("utf-8")
    for word in (
        "wonder",
        "secret-source",
        "candidate",
        "baseline",
        "samples",
        "reference",
        "tuned",
    ):
        assert word not in text
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy and policy[1].startswith(
        "default-src 'none'; base-uri 'none'; form-action 'none'; script-src 'nonce-"
    )
    assert "unsafe-inline" not in text and "innerHTML" not in text
    assert not re.search(r"https?:|\ssrc=|<link|@import|fetch\(|url\(", text)


def test_sides_are_sealed(tmp_path: Path) -> None:
    """The key says which answer is whose; the order changes from item to item and is the same in a
    second build."""
    a = write_folder(tmp_path / "a", [f"a{index}" for index in range(60)])
    b = write_folder(tmp_path / "b", [f"b{index}" for index in range(60)])
    made = build(a, b, tmp_path / "one.html")
    items = json.loads(Path(made["key"]).read_text())["items"]
    for item in page_data(Path(made["output"]))["items"]:
        sealed = items[item["item"]]
        names = "ab" if sealed["first"] == "candidate" else "ba"
        assert item["answers"] == [f"{name}{sealed['row']}" for name in names]
    assert 15 <= sum(sealed["first"] == "candidate" for sealed in items.values()) <= 45
    again = build(a, b, tmp_path / "two.html")
    assert Path(again["output"]).read_bytes() == Path(made["output"]).read_bytes()
    other = build(a, b, tmp_path / "three.html", seed=1)
    assert json.loads(Path(other["key"]).read_text())["items"].keys() != items.keys()


def test_rows_are_drawn_and_equal_answers_left_out(tmp_path: Path) -> None:
    """`rows` prompts are drawn, not the first ones; prompts answered alike are counted and left
    out."""
    a = write_folder(tmp_path / "a", ["same"] * 5 + [f"a{index}" for index in range(45)])
    b = write_folder(tmp_path / "b", ["same"] * 5 + [f"b{index}" for index in range(45)])
    made = build(a, b, tmp_path / "page.html", rows=10)
    rows = [sealed["row"] for sealed in json.loads(Path(made["key"]).read_text())["items"].values()]
    assert (made["items"], made["answered_alike"], len(rows)) == (10, 5, 10)
    assert min(rows) >= 5 and set(rows) != set(range(5, 15))


def test_half_a_surrogate_pair_is_shown(tmp_path: Path) -> None:
    """What an evaluation could write can be reviewed."""
    a, b = (
        write_folder(tmp_path / name, [text]) for name, text in {"a": "a\ud800", "b": "b"}.items()
    )
    assert build(a, b, tmp_path / "page.html")["items"] == 1
    assert "U+D800" in (tmp_path / "page.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b, out: (b / "samples.jsonl").unlink(), "there is no samples.jsonl"),
        (
            lambda b, out: (b / "samples.jsonl").write_text("{}\n{\n"),
            "samples.jsonl:1: is no sample",
        ),
        (lambda b, out: write_lines(b, ["question 0"]), "messages: other prompts than in"),
        (
            lambda b, out: write_lines(b, [f"other {index}" for index in range(12)]),
            "messages: other prompts than in",
        ),
        (
            lambda b, out: write_lines(b, None, ["y" * (index + 1) for index in range(12)]),
            "response: every answer is",
        ),
        (
            lambda b, out: out.write_text(
                '{"kind": "review key", "schema_version": 1, "page": "x", "items": {}, '
                '"systems": {}, "answered_alike": 0}'
            ),
            "of another page",
        ),
    ],
)
def test_build_refuses(
    pair: tuple[Path, Path], tmp_path: Path, spoil: Callable[[Path, Path], Any], message: str
) -> None:
    """What cannot be compared is refused with the file; a key that votes may need is not
    overwritten."""
    spoil(pair[1], tmp_path / "page.key.json")
    with pytest.raises(InputError, match=re.escape(message)):
        build(*pair, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def write_lines(folder: Path, prompts: Sequence[str] | None, answers: Sequence[str] = ()) -> None:
    """Other samples in a folder that has some."""
    (folder / "samples.jsonl").unlink()
    folder.rmdir()
    write_folder(folder, answers or ["x"] * len(prompts or ()), prompts)


def test_page_and_score_know_the_same_choices(key: Path) -> None:
    """Every choice and tag on the page is one that `score` reads, no key is used twice, and none is
    missing."""
    text = key.with_name("page.html").read_text("utf-8")
    assert re.findall(r'data-choice="(\w+)"', text) == list(CHOICES)
    assert re.findall(r'data-tag="([\w -]+)"', text) == [*TAGS, *TAGS]
    keys = re.findall(r'data-key="(\w+)"', text)
    assert len(set(keys)) == len(keys) == 6 + 2 * 6 + 3


def test_result_of_one_rater(key: Path) -> None:
    """Six wins, two losses, one tie and one both bad, counted by hand; the sides do not matter for
    any of it."""
    outcomes = ["candidate"] * 6 + ["baseline"] * 2 + ["same", "both_bad"]
    sides = ["candidate", "baseline"] * 5
    votes = [
        vote(key, row, outcome, left=sides[row], much=row == 0)
        for row, outcome in enumerate(outcomes)
    ]
    result = score(key, [write_votes(key, "ann", votes)])
    assert result["raters"] == {"ann": 10}
    assert result["items"] == {"page": 12, "won": 6, "lost": 2, "tied": 2}
    expected = {"candidate_much": 1, "candidate": 5, "baseline": 2, "same": 1, "both_bad": 1}
    assert result["choices"] == expected
    assert (result["win_rate"]["value"], result["win_rate"]["n"]) == (0.7, 10)
    assert (
        0.4 <= result["win_rate"]["ci_low"] <= 0.5 and 0.85 <= result["win_rate"]["ci_high"] <= 0.95
    )
    # 2 * (1 + 8 + 28) / 2^8: eight decisive items, two or fewer losses.
    assert result["p_value"] == pytest.approx(0.2890625)
    # Left was chosen where winner and left agree: rows 0, 2, 4 and 7.
    assert (result["left_chosen"]["value"], result["left_chosen"]["n"], result["left_p_value"]) == (
        0.5,
        8,
        1.0,
    )
    assert (
        result["agreement"]["n"] == 0
        and result["alpha"] is None
        and result["self_consistency"]["value"] is None
    )


def test_position_check(key: Path) -> None:
    """A rater who always takes the left side is found out, while the win rate stays one half."""
    sides = ["candidate", "baseline"] * 6
    result = score(
        key,
        [
            write_votes(
                key, "ann", [vote(key, row, side, left=side) for row, side in enumerate(sides)]
            )
        ],
    )
    assert result["win_rate"]["value"] == 0.5 and result["left_chosen"]["value"] == 1.0
    assert result["left_p_value"] == pytest.approx(2 / 2**12)


def test_interval_without_ties_is_wilsons(key: Path) -> None:
    """Eight of ten items: Wilson's 0.490 to 0.943; all of ten: 0.722 to 1, never a single point."""
    votes = [vote(key, row, "candidate" if row < 8 else "baseline") for row in range(10)]
    rate = score(key, [write_votes(key, "ann", votes)])["win_rate"]
    assert (rate["ci_low"], rate["ci_high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    rate = score(
        key, [write_votes(key, "ann", [vote(key, row, "candidate") for row in range(10)])]
    )["win_rate"]
    assert (rate["ci_low"], rate["ci_high"]) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_only_ties_leave_an_interval(key: Path) -> None:
    """Ten ties: one half, give or take half of the 0.2775 that ten items without a difference leave
    open."""
    result = score(key, [write_votes(key, "ann", [vote(key, row, "same") for row in range(10)])])
    rate = result["win_rate"]
    assert (rate["value"], result["p_value"], result["left_chosen"]["value"]) == (0.5, 1.0, None)
    assert (rate["ci_low"], rate["ci_high"]) == pytest.approx(
        (0.5 - 0.13877, 0.5 + 0.13877), abs=1e-4
    )


def test_items_are_resampled_not_votes(key: Path) -> None:
    """Three raters who vote alike say no more than one: the same rate, interval and sign test."""
    outcomes = ["candidate"] * 5 + ["same"] * 2 + ["baseline"] * 3
    files = [
        write_votes(key, rater, [vote(key, row, outcome) for row, outcome in enumerate(outcomes)])
        for rater in ("ann", "ben", "eve")
    ]
    one, three = score(key, files[:1]), score(key, files)
    assert one["win_rate"] == three["win_rate"] and one["p_value"] == three["p_value"]
    assert (three["agreement"]["value"], three["agreement"]["n"], three["alpha"]) == (1.0, 10, 1.0)


def test_raters_who_differ(key: Path) -> None:
    """Items are means of their raters: one half each where two disagree; agreement and alpha by
    hand."""
    ann = ["candidate", "candidate", "baseline", "same"]
    ben = ["candidate", "baseline", "baseline", "candidate"]
    files = [
        write_votes(key, name, [vote(key, row, outcome) for row, outcome in enumerate(outcomes)])
        for name, outcomes in (("ann", ann), ("ben", ben))
    ]
    result = score(key, files)
    # Item means 1, 0.5, 0, 0.75.
    assert result["win_rate"]["value"] == 0.5625
    assert result["items"] == {"page": 12, "won": 2, "lost": 1, "tied": 1}
    assert (result["agreement"]["value"], result["agreement"]["n"]) == (0.5, 4)
    # 4 of 8 ordered pairs differ; expected among 4 candidate, 3 baseline, 1 tie: (64 - 26) / 7 of
    # 8.
    assert result["alpha"] == pytest.approx(1 - 4 / (38 / 7))


def test_krippendorff_alpha_of_the_textbook() -> None:
    """The example of Krippendorff's own paper, four observers and gaps: nominal alpha 0.743."""
    observers = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
    units = [[one[unit] for one in observers if one[unit] != "."] for unit in range(12)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None
    assert krippendorff_alpha([["a"], ["b"]]) is None


def test_needed_items_of_the_printed_table() -> None:
    """The decisive items that the text names are those of a two-sided test at 0.05 with power
    0.8."""
    for percent, needed in NEEDED_ITEMS.items():
        share = percent / 100
        reach = stats.norm.ppf(0.975) * 0.5 + stats.norm.ppf(0.8) * (share * (1 - share)) ** 0.5
        assert needed == ceil((reach / (share - 0.5)) ** 2)
    assert len(NEEDED_ITEMS) == 4


def test_repeated_items_count_for_consistency_only(key: Path) -> None:
    """Two of three repeats agree with the first vote; a repeat without a first vote counts
    nowhere."""
    votes = [vote(key, row, "candidate") for row in range(4)]
    votes += [vote(key, row, "candidate", left="baseline", repeat=True) for row in (0, 1, 9)]
    votes += [vote(key, 2, "baseline", left="baseline", repeat=True)]
    result = score(key, [write_votes(key, "ann", votes)])
    assert (result["self_consistency"]["value"], result["self_consistency"]["n"]) == (
        pytest.approx(2 / 3),
        3,
    )
    assert (result["win_rate"]["value"], result["win_rate"]["n"], result["raters"]) == (
        1.0,
        4,
        {"ann": 4},
    )
    assert (result["left_chosen"]["value"], result["left_chosen"]["n"]) == (1.0, 4)


def test_win_rate_by_length(key: Path) -> None:
    """Twelve items in three parts by length ratio (1 to 4, 5 to 8, 9 to 12): longer answers win
    here."""
    votes = [
        vote(key, row, "candidate" if row >= 8 or row % 2 else "baseline") for row in range(12)
    ]
    thirds = score(key, [write_votes(key, "ann", votes)])["length_terciles"]
    assert [third["ratios"] for third in thirds] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert [third["value"] for third in thirds] == [0.5, 0.5, 1.0]
    few = score(key, [write_votes(key, "ann", votes[:2])])["length_terciles"]
    assert [third["n"] for third in few] == [1, 1]


def test_marks_go_to_the_system_that_was_shown_there(key: Path) -> None:
    """Tags, acceptability and comments follow the answer, not the side; who says nothing does not
    count."""
    votes = [
        vote(
            key,
            0,
            "candidate",
            acceptable=[True, False],
            tags=[["too long"], ["wrong", "unsafe"]],
            comment="Ah.",
        ),
        vote(key, 1, "candidate", left="baseline", acceptable=[False, True], tags=[["wrong"], []]),
        vote(key, 2, "candidate", acceptable=[False, None]),
    ]
    result = score(key, [write_votes(key, "ann", votes)])
    assert result["tags"] == {"candidate": {"too long": 1}, "baseline": {"wrong": 2, "unsafe": 1}}
    shares = {name: (one["value"], one["n"]) for name, one in result["acceptable"].items()}
    assert shares == {"candidate": (pytest.approx(2 / 3), 3), "baseline": (0.0, 2)}
    assert [(one["rater"], one["row"], one["comment"]) for one in result["comments"]] == [
        ("ann", 0, "Ah.")
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page": "0123"}, "votes-ann.json: page: the votes are of another page"),
        ({"kind": "review key"}, "votes-ann.json: kind: expected 'review votes'"),
        ({"schema_version": 2}, "of schema version 1"),
    ],
)
def test_score_refuses_files_of_another_review(
    key: Path, changes: Mapping[str, Any], message: str
) -> None:
    """Votes of another page, another kind of file and broken content are refused with the file's
    name."""
    with pytest.raises(InputError, match=re.escape(message)):
        score(key, [write_votes(key, "ann", [vote(key, 0, "same")], **changes)])


@pytest.mark.parametrize(
    "change",
    [
        {"item": "unknown"},
        {"item": ["unhashable"]},
        {"choice": "left_very_much"},
        {"left": 2},
        {"left": "left"},
        {"tags": [["rude"], []]},
        {"tags": [[]]},
        {"acceptable": ["yes", None]},
        {"acceptable": None},
        {"repeat": None, "item": None},
    ],
)
def test_score_refuses_votes_that_the_page_cannot_cast(
    key: Path, change: Mapping[str, Any]
) -> None:
    """An unknown item, choice, side, tag or mark is refused with the file and the number of the
    vote."""
    file = write_votes(key, "ann", [vote(key, 0, "same"), {**vote(key, 1, "same"), **change}])
    with pytest.raises(InputError, match=r"votes-ann\.json: votes\[1\]: does not fit the page"):
        score(key, [file])


def test_score_refuses_double_votes_and_raters(key: Path, tmp_path: Path) -> None:
    """No item counts twice for one rater, within a file or across files; a file that is no JSON is
    named."""
    with pytest.raises(InputError, match="a second vote on"):
        score(key, [write_votes(key, "ann", [vote(key, 0, "same")] * 2)])
    file = write_votes(key, "ann", [vote(key, 0, "same")])
    with pytest.raises(InputError, match="'ann' voted in another file, too"):
        score(key, [file, file])
    (tmp_path / "broken.json").write_text("{")
    for wrong in (tmp_path / "broken.json", tmp_path / "missing.json"):
        with pytest.raises(InputError, match=rf"{wrong.name}:.*(cannot be read|is no JSON)"):
            score(key, [wrong])
        with pytest.raises(InputError, match=rf"{wrong.name}:.*(cannot be read|is no JSON)"):
            score(wrong, [file])


def test_commands(
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`review build` and `review score` work from the command line, as text and as JSON; wrong
    votes end in code 2."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["sft-recipes", "review", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().out

    code, out = run("build", *pair, "--output", tmp_path / "page.html", "--rows", 8, "--json")
    made = json.loads(out)
    assert (code, made["items"]) == (0, 8)
    key = Path(made["key"])
    rows = [sealed["row"] for sealed in json.loads(key.read_text())["items"].values()]
    file = write_votes(key, "ann", [vote(key, row, "candidate", comment="Good.") for row in rows])
    code, out = run("score", key, file, "--json")
    assert (code, json.loads(out)["win_rate"]["value"]) == (0, 1.0)
    code, out = run("score", key, file)
    assert code == 0 and "win rate          1.000 [0.68, 1.00] of the candidate" in out
    assert "fewer than 20 items" in out and "0 prompts answered alike" in out
    assert "8 items won, 0 lost, 0 tied: p = 0.00781" in out and "ann: Good." in out
    assert run("score", key, write_votes(key, "ann", [], page="x"))[0] == 2
