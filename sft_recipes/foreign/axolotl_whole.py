"""What takes more than one key of an axolotl config: warmup, evaluation, packing, Alpaca in chat models."""

from sft_recipes.foreign.reading import Group, Reading

# Older flags that each ask for an attention that keeps packed rows apart.
_ATTENTION_FLAGS = (
    "flash_attention",
    "xformers_attention",
    "sdp_attention",
    "flex_attention",
    "eager_attention",
)
# Words in a model's name that say it was tuned to chat.
_CHAT_NAMES = ("instruct", "-chat", "-it")


def finish(reading: Reading) -> None:
    """What takes more than one key: warmup, evaluation, packing, Alpaca in chat models."""
    recipe = reading.recipe
    if "warmup_steps" not in recipe:
        # `_configure_warmup_and_logging`: 3 % of the steps, at most 100.
        reading.put_default("warmup_steps", 0.03, "3 % of the steps, in axolotl at most 100")
    if "save_strategy" not in recipe:
        reading.put_default("save_strategy", "epoch", "after each epoch, as in axolotl")
    _settle_evaluation(reading)
    _look_at_packing(reading)
    _look_at_alpaca(reading)


def _settle_evaluation(reading: Reading) -> None:
    recipe = reading.recipe
    has_rows = "eval_split" in recipe or "dataset_test_split" in recipe
    if has_rows and "eval_strategy" not in recipe:
        say = "after each epoch; axolotl never evaluates these rows"
        reading.put_default("eval_strategy", "epoch", say)
        what = "rows are held out and nothing says when to evaluate them: axolotl never does"
        reading.find(reading.setting("val_set_size"), what)
    if has_rows:
        return
    why = "the rows to evaluate are of another data set, which is not asked during training"
    for key in ("eval_steps", "eval_strategy", "load_best_model_at_end", "metric_for_best_model"):
        if key in recipe:
            reading.withdraw(key, why, Group.DIFFERENT)


def _look_at_packing(reading: Reading) -> None:
    setting = reading.setting("sample_packing")
    if setting is None or not setting.value:
        return
    if any(reading.value(flag) for flag in _ATTENTION_FLAGS):
        return
    attention = str(reading.value("attn_implementation") or "none is set")
    name = attention.partition(":")[0].partition("@")[0].strip()
    if name not in reading.table.more["separating"]:
        what = f"packed rows see one another in axolotl under this attention ({attention})"
        reading.find(setting, what)


def _look_at_alpaca(reading: Reading) -> None:
    model = str(reading.value("base_model") or "").lower()
    tuned = any(name in model for name in _CHAT_NAMES)
    if tuned and reading.recipe.get("chat_template") == "alpaca":
        reading.find(
            reading.setting("datasets"),
            "Alpaca text in a model that was tuned to chat: served by its own template, it never sees "
            "what it was trained on",
        )
