"""What is wrong with a foreign config, stated on our keys, so once for all tools."""

from sft_recipes.foreign.reading import Reading

# "LoRA Without Regret" (Thinking Machines, 2025) and TRL's documentation: about ten times the rate of full fine-tuning;
# axolotl's documentation: LoRA 1e-4 to 3e-4, full fine-tuning 1e-5 to 5e-5.
_LOWEST_LORA_RATE = 5e-5
_HIGHEST_FULL_RATE = 1e-4
_RATES = "TRL's and axolotl's documentation, LoRA Without Regret"


def look(reading: Reading) -> None:
    """Add what is found to the findings of the reading."""
    _look_at_rate(reading)
    _look_at_evaluation(reading)
    _look_at_checkpoints(reading)
    _look_at_precision(reading)


def _look_at_rate(reading: Reading) -> None:
    rate = reading.recipe.get("learning_rate")
    if not isinstance(rate, float | int):
        return
    origin = reading.origins["learning_rate"]
    lora = reading.recipe.get("use_peft", False)
    if lora and rate < _LOWEST_LORA_RATE:
        what = f"LoRA at {rate:g}, a rate of full fine-tuning; usual for LoRA is 1e-4 to 3e-4"
        reading.find(origin, what, judgement=True, source=_RATES)
    elif not lora and rate > _HIGHEST_FULL_RATE:
        what = f"full fine-tuning at {rate:g}, a rate of LoRA; usual is 1e-5 to 5e-5"
        reading.find(origin, what, judgement=True, source=_RATES)


def _look_at_evaluation(reading: Reading) -> None:
    recipe = reading.recipe
    held_out = recipe.get("eval_split") or recipe.get("dataset_test_split")
    if not held_out and not reading.evaluates_elsewhere:
        what = "no rows are held out: nothing tells a run that learns from one that only memorises"
        reading.find(None, what, judgement=True)


def _look_at_checkpoints(reading: Reading) -> None:
    if reading.recipe.get("save_strategy") == "no":
        what = "no checkpoint before the end: a run that is stopped is lost"
        reading.find(reading.origins["save_strategy"], what)


def _look_at_precision(reading: Reading) -> None:
    recipe = reading.recipe
    pure = recipe.get("dtype") == "bfloat16" and not recipe.get("use_peft")
    if pure:
        what = "full fine-tuning with weights in bfloat16: updates below 1/256 of a weight are rounded away"
        reading.find(reading.origins["dtype"], what)
