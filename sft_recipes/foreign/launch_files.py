"""Which of our launch configs does what a DeepSpeed file asks for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipes.foreign.reading import Reading, Setting
from sft_recipes.foreign.tables import is_off


def use_deepspeed(reading: Reading, setting: Setting, quantized: bool = False) -> None:
    """Choose a launch config by the ZeRO stage of a DeepSpeed config, which is a file or stands here itself.

    Where the file is not at hand its name has to say the stage. ZeRO-3 is refused for `quantized` weights.
    """
    if is_off(setting.value):
        reading.no_effect(setting, "switched off")
        return
    name, stage, offloads = _stage_of(reading, setting.value)
    if stage not in (0, 1, 2, 3):
        why = f"{name} is not there and its name says no ZeRO stage: give the recipe to `train --launch zero3`"
        reading.block(setting, why)
        return
    reading.launch = "ddp" if stage == 0 else f"zero{stage}"
    say = f"`train --launch {reading.launch}` in place of {name}"
    if quantized and stage == 3:
        reading.launch = "fsdp2_qlora"
        say = f"`train --launch fsdp2_qlora` in place of {name}: ZeRO-3 does not shard quantized weights"
    elif offloads and stage == 3:
        reading.launch = "zero3_offload"
        say = f"`train --launch zero3_offload` in place of {name}"
    elif offloads:
        say += ", without moving the optimizer to the CPU"
    reading.differs(setting, say)


def _stage_of(reading: Reading, value: Any) -> tuple[str, int | None, bool]:
    """The name, the ZeRO stage and whether something goes to the CPU."""
    if isinstance(value, Mapping):
        return "the DeepSpeed block", *_stage_in(value)
    path = reading.find_file(str(value))
    if path is not None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        if isinstance(content, Mapping):
            return str(value), *_stage_in(content)
    name = Path(str(value)).name.lower()
    for stage in (1, 2, 3):
        if any(word in name for word in (f"zero{stage}", f"z{stage}", f"stage{stage}")):
            return f"{value} (not there, judged by its name)", stage, "offload" in name
    if "z0" in name or "zero0" in name:
        return f"{value} (not there, judged by its name)", 0, False
    return str(value), None, False


def _stage_in(content: Mapping[str, Any]) -> tuple[int | None, bool]:
    zero = content.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        return None, False
    devices = []
    for key in ("offload_optimizer", "offload_param"):
        part = zero.get(key)
        if isinstance(part, Mapping):
            devices.append(part.get("device"))
    stage = zero.get("stage", 0)
    return stage if isinstance(stage, int) else None, "cpu" in devices
