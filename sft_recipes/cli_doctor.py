"""`sft-recipes doctor`: what is wrong with a run, whichever tool made it."""

import typer

from sft_recipes import cli_options as opt
from sft_recipes.cli_output import print_json


def doctor(
    run: opt.AnyRunArgument,
    base: opt.BaseFolderOption = None,
    merged: opt.MergedOption = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Say what is wrong with a run that any tool made: log, weights, tokens, template. Exit code 1 if anything is.

    Nothing is loaded, no pickle is opened, nothing is asked of the Hub.
    """
    from sft_recipes.doctor.doctor import examine
    from sft_recipes.doctor.text import report_text
    from sft_recipes.upstream.quiet import quiet_libraries

    quiet_libraries()
    report = examine(run, base, merged, progress=not as_json)
    if as_json:
        print_json(report.as_json())
    else:
        print(report_text(report))
    raise typer.Exit(int(bool(report.findings)))
