"""Commands that let a model answer: `chat` to a person, `replay` to prompts of a file."""

from pathlib import Path

import typer

from sft_recipes import cli_options as opt
from sft_recipes.cli_output import print_json, speaking_on_stderr


def replay(
    context: typer.Context,
    model: opt.ModelArgument,
    prompts: opt.PromptsOption,
    rows: opt.DrawnOption,
    output: opt.ReplayFileOption = Path("replay.jsonl"),
    max_new_tokens: opt.NewTokensOption = 256,
    batch_size: opt.BatchOption = None,
    format: opt.FormatOption = None,
    columns: opt.ColumnsOption = None,
    column_mapping: opt.MappingOption = None,
    chat_template: opt.TemplateOption = None,
    force: opt.OverwriteOption = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Let a model answer general prompts before it is tuned: rows against forgetting.

    `--key value` sets a recipe's key for the prompts, `--data_seed N` draws others.
    """
    from sft_recipes.evaluation.replay import ReplayRequest, write_replay
    from sft_recipes.upstream.quiet import quiet_libraries

    quiet_libraries()
    request = ReplayRequest(
        model=model,
        prompts=prompts,
        rows=rows,
        output=output,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        force=force,
        options=opt.data_options(context),
    )
    with speaking_on_stderr(as_json):
        written = write_replay(request, progress=not as_json)
    if as_json:
        print_json(written.as_json())
    else:
        print(written.as_text(model))


def chat(
    run: opt.ModelArgument,
    base: opt.BesideOption = None,
    chat_template: opt.TemplateOption = None,
    max_new_tokens: opt.NewTokensOption = 256,
    as_json: opt.JsonOption = False,
) -> None:
    """Talk to a model: a line is a turn, /help lists the commands, such as /base on and /save FILE.

    Ctrl-C stops an answer, Ctrl-D leaves. --json prints one object per answer.
    """
    from sft_recipes.evaluation.chat import chat as converse
    from sft_recipes.upstream.quiet import quiet_libraries

    quiet_libraries()
    converse(run, base, chat_template, max_new_tokens, as_json)
