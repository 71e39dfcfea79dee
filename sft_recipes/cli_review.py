"""`sft-recipes review`: a blind A/B page for people, and its result."""

from pathlib import Path

import typer

from sft_recipes import cli_options as opt
from sft_recipes.cli_output import print_json

review = typer.Typer(help="Blind human A/B review of two evaluations.")


@review.command("build")
def review_build(
    candidate: opt.CandidateArgument,
    baseline: opt.BaselineArgument,
    output: opt.PageOption = Path("review.html"),
    rows: opt.ItemsOption = 100,
    seed: opt.SeedOption = 0,
    as_json: opt.JsonOption = False,
) -> None:
    """Write one page on which people compare two evaluations without knowing whose they are."""
    from sft_recipes.evaluation.review import build

    built = build(candidate, baseline, output, rows, seed)
    if as_json:
        print_json(built)
    else:
        left_out = f"{built['answered_alike']} answered alike were left out"
        print(f"page: {built['output']}, {built['items']} items; {left_out}")
        print(f"key, not for raters: {built['key']}")


@review.command("score")
def review_score(
    key: opt.KeyArgument,
    votes: opt.VotesArgument,
    as_json: opt.JsonOption = False,
) -> None:
    """Resolve the votes: win rate, agreement, consistency, position and length."""
    from sft_recipes.evaluation.review import score
    from sft_recipes.evaluation.written_report import add_votes
    from sft_recipes.report.review_text import review_text

    result = score(key, votes)
    report = add_votes(result)
    if as_json:
        print_json(result)
        return
    print(review_text(result))
    if report is None:
        print("The candidate's folder is not there or has other answers: no report shows this.")
    else:
        print(f"report: {report}")
