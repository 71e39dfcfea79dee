"""`trust_remote_code` of a foreign config: a model's own code is never run."""

from sft_recipes.foreign.reading import Reading, Setting
from sft_recipes.foreign.tables import is_off


def take(reading: Reading, setting: Setting, is_native: bool = False) -> None:
    """Block it, unless the user says that transformers has a class for the model, or `is_native` that it has one."""
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
    elif is_native or reading.remote_code_is_not_needed:
        say = "the model's class in transformers is used, none of the model's own code"
        reading.differs(setting, say)
    else:
        why = "code of the model is not run. Where transformers has a class for it: --trust_remote_code_is_not_needed"
        reading.block(setting, why)
