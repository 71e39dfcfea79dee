"""What a server makes of the run's tokens: where answers end, what pads, which ids have no embedding."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_recipes.data.chat_templates import PROBE, ChatRenderer
from sft_recipes.doctor.file_checks import embedding_rows
from sft_recipes.doctor.finding import Look, NotSeen, command, python
from sft_recipes.doctor.folder import GENERATION_CONFIG, Run
from sft_recipes.model_folder import ADAPTER_CONFIG, CONFIG
from sft_recipes.report.number_texts import counted

_COPY_TOKENIZER = (
    "import sys; from transformers import AutoTokenizer as T; "
    "T.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
)
_COPY_TEMPLATE = (
    "import sys; from transformers import AutoTokenizer as T; "
    "base, run = map(T.from_pretrained, sys.argv[1:]); "
    "run.chat_template = base.chat_template; run.save_pretrained(sys.argv[2])"
)
# What in an adapter trains the embeddings of new tokens.
_EMBEDDINGS = re.compile("embed_tokens|lm_head|wte|embed_in|embed_out")


def tokenizer_is_there(run: Run, look: Look) -> None:
    """The tokenizer of the training was saved with the run."""
    if run.tokenizer_folder is not None:
        look.seen = f"{len(run.tokenizer):,} ids, in {run.tokenizer_folder}"
        return
    what = "no tokenizer was saved with the run"
    why = "with another one than in training, ids mean something else"
    fix = "copy that of the base: " + python(_COPY_TOKENIZER, run.base_name or "BASE", run.model)
    look.find("warning", run.model, what, why, fix)


# -- the chat template -----------------------------------------------------------------------------


def template_is_there(run: Run, look: Look) -> None:
    """There is a chat template, it renders, and its answers end in a special token."""
    if not run.tokenizer.chat_template:
        _find_no_template(run, look)
        return
    layout = run.renderer.layout(PROBE)
    end = end_of_turn(run.renderer)
    if end is None:
        what = "no special token ends an assistant turn"
        if layout is not None and layout.tail.strip():
            what += f", which ends in the text {layout.tail.strip()!r}"
        why = "the model never learned to stop, and a server does not know where to"
        fix = (
            "end assistant turns with {{ eos_token }} in the template, and train again; or make the "
            "text that ends them a special token"
        )
        look.find("error", run.template_place, what, why, fix)
    look.seen = f"an answer ends in {end}"


def _find_no_template(run: Run, look: Look) -> None:
    what = "there is no chat template"
    why = "a server cannot make a prompt of messages"
    if run.base is not None and run.base_tokenizer.chat_template:
        fix = f"that of the base: {python(_COPY_TEMPLATE, run.base, run.tokenizer_folder or run.model)}"
        look.find("error", run.template_place, f"{what}, and the base has one", why, fix)
        return
    fix = (
        f"save the template that it was trained with as {run.model / 'chat_template.jinja'}; once: "
        + command("evaluate", run.model, "--chat_template", "TEMPLATE.jinja", "--data")
        + " FILE"
    )
    look.find("warning", run.template_place, what, why, fix)


def template_is_the_bases(run: Run, look: Look) -> None:
    """The chat template is the base's own, where the base has one (judged)."""
    own = run.tokenizer.chat_template
    base = run.base_tokenizer.chat_template
    if not base:
        look.seen = "the base has none"
        return
    look.seen = "the same text"
    if own and own != base:
        what = f"the chat template is not the base's: {_first_difference(str(base), str(own))}"
        why = "what the base had learned of its own format is not used"
        fix = f"if it was not meant, train again with the base's, as in {run.base}"
        look.judge("note", run.template_place, what, why, fix)


def _first_difference(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    changed = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    if not changed:
        return "only its ends of lines differ"
    return f"{len(changed)} lines differ, the first {changed[0][:60]!r}"


def end_of_turn(renderer: ChatRenderer) -> str | None:
    """The token in which the template ends an answer."""
    layout = renderer.layout(PROBE)
    return None if layout is None else layout.terminator.token


# -- end tokens --------------------------------------------------------------------------------------


def ends_agree(run: Run, look: Look) -> None:
    """The token that ends an answer in the chat template is among the EOS of `generation_config.json`, or of
    `config.json` where that names none: else the model does not stop. No EOS stands inside an answer:
    else it stops early.
    """
    tokenizer = run.tokenizer
    end = tokenizer.eos_token
    if tokenizer.chat_template:
        end = end_of_turn(run.renderer)
    if end is None:
        raise NotSeen("no special token ends an answer")
    end_id = tokenizer.convert_tokens_to_ids(end)
    config_ids = _ids(run.text_config.get("eos_token_id")) or _ids(run.config.get("eos_token_id"))
    stops = _ids(run.generation_config.get("eos_token_id")) or config_ids
    place = run.configs / GENERATION_CONFIG
    if not run.generation_config:
        place = run.configs / CONFIG
    look.seen = (
        f"answers end in {end}; servers stop at {_names(tokenizer, stops)}; "
        f"EOS of the tokenizer {tokenizer.eos_token}"
    )
    fix = f"write a folder in which they agree: {command('export', run.model)}"
    if end_id not in stops:
        what = f"answers end in {end}, and eos_token_id stops at {_names(tokenizer, stops)}"
        why = "the model does not stop: it goes on with turns that nobody asked for"
        look.find("error", place, what, why, fix)
    elif end_id not in (*config_ids, tokenizer.eos_token_id):
        what = f"only {place.name} knows that answers end in {end}"
        why = (
            f"whoever reads {CONFIG} or the tokenizer's EOS alone, as converters to other formats do, "
            "does not stop"
        )
        look.judge("note", place, what, why, fix)
    if tokenizer.chat_template:
        _require_no_early_end(run, [*stops, tokenizer.eos_token_id], end_id, look)


def _require_no_early_end(run: Run, stops: Sequence[int], end_id: int, look: Look) -> None:
    """No stop stands in front of an answer's own end."""
    prompt = run.renderer.render(PROBE[:1], add_generation_prompt=True)
    text = run.renderer.render(PROBE)
    if not text.startswith(prompt):
        return
    answer = run.renderer.text_ids(text.removeprefix(prompt))
    if end_id in answer:
        answer = answer[: answer.index(end_id)]
    early = [token for token in answer if token in stops]
    if early:
        what = (
            f"the template writes {_names(run.tokenizer, early)} inside an answer, which is a stop"
        )
        why = "the model stops early"
        fix = f"remove it from eos_token_id in {run.configs / GENERATION_CONFIG}"
        look.find("error", run.template_place, what, why, fix)


def padding_is_no_end(run: Run, look: Look) -> None:
    """PAD is another token than the one that ends an answer: else a collator that masks PAD masks the end
    (judged).
    """
    tokenizer = run.tokenizer
    pad = tokenizer.pad_token_id
    if pad is None:
        look.seen = "there is no PAD"
        return
    look.seen = f"PAD is {tokenizer.pad_token}, EOS {tokenizer.eos_token}"
    ends = {tokenizer.eos_token}
    if tokenizer.chat_template:
        ends.add(end_of_turn(run.renderer))
    if tokenizer.pad_token in ends:
        what = f"PAD is {tokenizer.pad_token}, which ends an answer, too"
        why = (
            "a collator that masks every PAD (DataCollatorForLanguageModeling) never trains the end, "
            "and the model does not stop"
        )
        fix = (
            f"see whether answers end: {command('evaluate', run.model, '--data')} FILE; if not, train "
            "again with another pad_token"
        )
        look.judge("note", _tokenizer_place(run), what, why, fix)


def _ids(value: Any) -> list[int]:
    """EOS as configurations write it: one id, several, or none."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int)]


def _names(tokenizer: Any, ids: Sequence[int]) -> str:
    texts: list[str] = []
    for token in dict.fromkeys(ids):
        name = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
        texts.append(str(name or token))
    return ", ".join(texts) or "nothing"


def _tokenizer_place(run: Run) -> Path:
    return (run.tokenizer_folder or run.model) / "tokenizer_config.json"


# -- vocabulary ----------------------------------------------------------------------------------------


def ids_have_embeddings(run: Run, look: Look) -> None:
    """Every id of the tokenizer has a row in the embedding of the run, or of its base."""
    rows = embedding_rows(run.weights) or _rows_in_adapter(run)
    if rows is None:
        rows = embedding_rows(run.base_weights)
    if rows is None:
        raise NotSeen("no embedding is known by its name in the weights")
    size = len(run.tokenizer)
    look.seen = f"{size:,} ids, {rows:,} rows"
    if size > rows:
        what = f"the tokenizer has {size:,} ids, the embedding {rows:,} rows"
        why = "text with the last ids ends generation in an index error"
        fix = "save the tokenizer that belongs to the weights, or resize and train the embeddings"
        if run.adapter is not None:
            fix = 'train again with modules_to_save=["embed_tokens", "lm_head"] beside the adapter'
        look.find("error", _tokenizer_place(run), what, why, fix)


def _rows_in_adapter(run: Run) -> int | None:
    """Rows of an embedding that was saved with an adapter, under whichever name peft gives it."""
    for name, tensor in run.adapter_weights.tensors.items():
        is_whole = "lora_" not in name and len(tensor.shape) == 2
        if is_whole and _EMBEDDINGS.search(name):
            return tensor.shape[0]
    return None


def new_tokens_are_trained(run: Run, look: Look) -> None:
    """Tokens that an adapter's tokenizer has and its base's has not were trained: embeddings stand in
    `modules_to_save`, `target_modules` or `trainable_token_indices`.
    """
    if run.adapter is None:
        raise NotSeen("only an adapter can leave embeddings out")
    added = sorted(run.tokenizer.get_vocab().keys() - run.base_tokenizer.get_vocab().keys())
    look.seen = f"{len(added)} tokens more than the base has"
    if not added:
        return
    if run.adapter.get("trainable_token_indices"):
        return
    trained = [run.adapter.get("modules_to_save"), run.adapter.get("target_modules")]
    if _EMBEDDINGS.search(str(trained)):
        return
    shown = ", ".join(added[:3])
    what = f"{counted(len(added), 'new token')} ({shown}), and no embedding in the adapter"
    why = "their embeddings are those of unused rows, as random as before training"
    fix = (
        'train again with modules_to_save=["embed_tokens", "lm_head"] or trainable_token_indices, or '
        "without new tokens"
    )
    look.find("error", run.model / ADAPTER_CONFIG, what, why, fix)
