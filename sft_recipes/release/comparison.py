"""Models compared by what they say to the same prompts: logits, and greedy text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.errors import CheckFailed, InputError, Problem
from sft_recipes.models import load_weights

NEW_TOKENS = 32  # of each answer
POSITIONS = 16  # at the end of each prompt whose logits are compared
# Largest difference of a logit as a share of the largest logit: rounding, and nothing else.
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Comparison:
    """A model against the one that was trained: the largest difference of a logit, the largest
    logit, and on how many of the prompts the greedy text is the same.
    """

    logit_difference: float
    largest_logit: float
    equal_texts: int
    prompts: int


class Answer(NamedTuple):
    """What a model says to one prompt."""

    logits: torch.Tensor  # [positions, vocabulary], at the end of the prompt
    ids: list[int]  # of the greedy text


@dataclass(frozen=True)
class Questions:
    """Prompts, as ids, that each model is asked."""

    prompts: Sequence[Sequence[int]]
    renderer: ChatRenderer
    progress: bool

    def ask(self, name: str, model: Any) -> list[Answer]:
        """The answers of a model; `name` is what the progress bar calls it."""
        title = f"asking the {name} model"
        answers = []
        for prompt in tqdm(
            self.prompts, title, disable=None if self.progress else True, leave=False
        ):
            ids = torch.tensor([prompt], device=model.device)
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[0, -POSITIONS:].cpu()
                generated = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=NEW_TOKENS,
                    eos_token_id=list(self.renderer.stop_ids),
                    pad_token_id=self.renderer.tokenizer.pad_token_id,
                )
            answers.append(Answer(logits, generated[0, len(prompt) :].tolist()))
        return answers


def load_exactly(source: str, revision: str | None = None) -> Any:
    """A model in float32, to be asked. Raises InputError where its weights are stored quantized.

    Loaded so, not made so: what a model computes when it is built, as the scale of Gemma's
    embeddings, is rounded to the precision in which it is loaded, and stays rounded.
    """
    model = load_weights(source, torch.float32, revision)
    if getattr(model, "is_quantized", False):
        what = "its weights are stored quantized"
        fix = "name the full-precision model and train with load_in_4bit: true"
        raise InputError(Problem(source, "model_name_or_path", what, fix))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def compare(trained: Sequence[Answer], other: Sequence[Answer]) -> Comparison:
    """A model's answers against those of the one that was trained."""
    pairs = list(zip(trained, other, strict=True))
    return Comparison(
        logit_difference=_largest([before.logits - after.logits for before, after in pairs]),
        largest_logit=_largest([before.logits for before, _ in pairs]),
        equal_texts=sum(before.ids == after.ids for before, after in pairs),
        prompts=len(pairs),
    )


def require_same(step: str, comparison: Comparison, dtype: str) -> None:
    """Raise CheckFailed where rounding does not explain a difference.

    In less than float32 a near tie may fall the other way, so there texts are counted and need not
    be equal.
    """
    is_rounding = comparison.logit_difference <= TOLERANCES[dtype] * comparison.largest_logit
    all_equal = comparison.equal_texts == comparison.prompts
    if not is_rounding or (dtype == "float32" and not all_equal):
        what = (
            "this is not the model that was trained: logits differ by "
            f"{comparison.logit_difference:.3g}, greedy text is equal on "
            f"{comparison.equal_texts} of {comparison.prompts} prompts"
        )
        fix = "nothing was exported; report the model and its adapter settings"
        raise CheckFailed(str(Problem(step, "", what, fix)))


def _largest(values: Sequence[torch.Tensor]) -> float:
    """The largest absolute value; NaN, which no tolerance allows, if there is one."""
    return float(torch.stack([value.abs().max() for value in values]).max())
