"""How often axolotl evaluates and saves, and its cosine schedule with a floor."""

from collections.abc import Callable, Mapping

from sft_recipes.foreign.reading import Reading, Setting
from sft_recipes.foreign.tables import is_off


def _evaluates(reading: Reading) -> bool:
    return bool(reading.value("val_set_size") or reading.value("test_datasets"))


def _evals_per_epoch(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
        return
    if not _evaluates(reading):
        reading.no_effect(setting, "no rows are held out (val_set_size)")
        reading.find(
            setting, "evaluations are asked for and no rows are held out: axolotl never evaluates"
        )
        return
    share = 1 / (float(setting.value) * float(reading.value("num_epochs")))
    if share < 1:
        ours = {"eval_strategy": "steps", "eval_steps": round(share, 6)}
        reading.differs(
            setting, "the same share of the steps; axolotl also evaluates before the first", ours
        )
        return
    # `normalize_config` drops a share of 1, and no strategy is left.
    ours = {"eval_strategy": "epoch"}
    reading.differs(setting, "evaluated after each epoch; axolotl drops this setting", ours)
    reading.find(
        setting,
        "once an epoch in one epoch comes to 1.0 of the steps, which axolotl drops: it never evaluates",
    )


def _saves_per_epoch(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
        return
    share = 1 / (float(setting.value) * float(reading.value("num_epochs")))
    if share < 1:
        reading.same(setting, {"save_strategy": "steps", "save_steps": round(share, 6)})
    else:
        reading.same(setting, {"save_strategy": "epoch"})


def _eval_steps(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
    elif not _evaluates(reading):
        reading.no_effect(setting, "no rows are held out (val_set_size)")
        reading.find(
            setting, "evaluations are asked for and no rows are held out: axolotl refuses it"
        )
    else:
        ours = {"eval_strategy": "steps", "eval_steps": setting.value}
        reading.differs(setting, "the same; axolotl also evaluates before the first step", ours)


def _eval_strategy(reading: Reading, setting: Setting) -> None:
    if _evaluates(reading):
        reading.same(setting, {"eval_strategy": setting.value})
        return
    reading.no_effect(setting, "no rows are held out (val_set_size)")
    if setting.value != "no":
        what = "evaluations are asked for and no rows are held out: axolotl refuses it"
        reading.find(setting, what)


def _save_steps(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
    else:
        reading.same(setting, {"save_strategy": "steps", "save_steps": setting.value})


def _save_strategy(reading: Reading, setting: Setting) -> None:
    if setting.value == "best":
        ours = {"save_strategy": "best", "metric_for_best_model": "eval_loss"}
        reading.same(setting, ours)
    else:
        reading.same(setting, {"save_strategy": setting.value})


def _cosine_min_lr_ratio(reading: Reading, setting: Setting) -> None:
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
        return
    if reading.value("lr_scheduler") not in (None, "cosine"):
        reading.no_effect(setting, "only the cosine schedule uses it")
        return
    reading.recipe.pop("lr_scheduler_type", None)
    reading.origins.pop("lr_scheduler_type", None)
    ours = {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": setting.value},
    }
    reading.differs(
        setting, "transformers' cosine_with_min_lr: the same peak and the same floor", ours
    )


RULES: Mapping[str, Callable[[Reading, Setting], None]] = {
    "evals_per_epoch": _evals_per_epoch,
    "saves_per_epoch": _saves_per_epoch,
    "eval_steps": _eval_steps,
    "eval_strategy": _eval_strategy,
    "save_steps": _save_steps,
    "save_strategy": _save_strategy,
    "cosine_min_lr_ratio": _cosine_min_lr_ratio,
}
