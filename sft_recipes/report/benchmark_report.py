"""Results of public benchmarks in words: in the terminal, as a page, for the model card."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sft_recipes.messages import visible
from sft_recipes.report import page
from sft_recipes.report.number_texts import format_estimate, thousands

Content = Mapping[str, Any]

# What lm-eval generates at most where a task does not say.
LM_EVAL_NEW_TOKENS = 256


class Setting(NamedTuple):
    """One thing that decides how a model was asked."""

    label: str
    value: str


def settings_in_words(settings: Content) -> list[Setting]:
    """How the model is asked, from the settings that lm-eval reads."""
    template = "none: the model has none, and is asked as lm-eval asks bases"
    bos = "as the tokenizer adds it"
    shots = "in one text with the question"
    if settings["apply_chat_template"]:
        template = "applied"
        bos = "as the template writes it"
        shots = "a turn each"
    count = settings["num_fewshot"]
    number = "as many as the task has" if count is None else str(count)
    limit = settings["limit"]
    rows = "all" if limit is None else f"the first {limit} of each: nothing to compare with others"
    longest = f"as the task has it, else {LM_EVAL_NEW_TOKENS} tokens"
    if settings["gen_kwargs"]:
        longest = f"{settings['gen_kwargs']['max_gen_toks']} tokens"
    data = "from the Hub"
    if settings.get("include_path"):
        data = f"from {settings['include_path'][0]} where it has them, else from the Hub"
    return [
        Setting("Model", settings["model_args"]["pretrained"]),
        Setting("Rows", f"{rows}, {data}"),
        Setting("Chat template", template),
        Setting(
            "System prompt", settings["system_instruction"] or "none but what the template has"
        ),
        Setting("Few-shot examples", f"{number}, {shots}"),
        Setting("BOS", bos),
        Setting("Longest answer", longest),
        Setting("Precision", "that of the model's files"),
        Setting("Batches", f"{settings['batch_size']} on {settings['device']}"),
    ]


def settings_text(settings: Content) -> str:
    """The same for the terminal."""
    lines = [f"{line.label:18} {line.value}" for line in settings_in_words(settings)]
    return visible("\n".join(lines))


def longest_answer(result: Content) -> int | str:
    """Most tokens of an answer to a benchmark; where choices are compared, none are generated."""
    generation = result["generation"]
    return 0 if generation is None else generation.get("max_gen_toks", LM_EVAL_NEW_TOKENS)


def fewer_rows(result: Content) -> list[str]:
    """What makes the scores worth less, if not all rows were asked."""
    rows = result["rows"]
    whole = result["rows_of_benchmark"]
    if rows == whole:
        return []
    return [f"{thousands(rows)} of {thousands(whole)} rows"]


class ScoreLine(NamedTuple):
    """One metric of one benchmark."""

    benchmark: str
    metric: str
    estimate: str
    n: int
    shots: int | None
    note: str


def score_lines(result: Content) -> list[ScoreLine]:
    """The metrics of a benchmark, with what makes them worth less."""
    note = "".join(fewer_rows(result))
    lines = []
    for metric in result["metrics"]:
        name = f"{metric['metric']}, {metric['filter']}"
        estimate = format_estimate(metric)
        lines.append(
            ScoreLine(result["benchmark"], name, estimate, metric["n"], result["shots"], note)
        )
    return lines


def results_text(results: Sequence[Content]) -> str:
    """The table for the terminal."""
    lines = [f"{'benchmark':20} {'metric':32} {'value [95 % interval]':24} {'n':>6} {'shots':>5}"]
    for result in results:
        for line in score_lines(result):
            shots = "" if line.shots is None else line.shots
            lines.append(
                f"{line.benchmark:20} {line.metric:32} {line.estimate:24} "
                f"{line.n:6} {shots:>5}  {line.note}".rstrip()
            )
    return visible("\n".join(lines))


def render_benchmark_report(results: Sequence[Content]) -> str:
    """All benchmarks of a folder as one HTML document: scores first, then how each was asked."""
    texts = page.macros("benchmarks.html")
    lines = []
    sections = {}
    for result in results:
        lines += score_lines(result)
        settings = settings_in_words(result["settings"])
        sections[f"How {result['benchmark']} was asked"] = texts.settings(result, settings)
    summary = "Scored by lm-eval; two-sided 95 % intervals of the rows alone."
    return page.render_page(
        "Public benchmarks", summary, {"Scores": texts.scores(lines), **sections}
    )
