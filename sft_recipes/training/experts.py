"""The experts of a mixture, and how many of their tensors are trained."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS = re.compile(r"\bexperts\b")  # not shared_experts, which every token passes through
_ROUTER = re.compile(r"\.(gate|router)(\.base_layer)*\.weight$")


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a model: how many in a layer, their weights by name, how many of these are
    trained, whole or through an adapter, and whether an adapter is on the routers.
    """

    a_layer: int | str
    layers: int
    weights: Sequence[str]
    trained: int
    adapts: bool
    adapts_router: bool

    def __str__(self) -> str:
        of_all = f"{self.trained} of {len(self.weights)} expert tensors"
        covered = f"{of_all} trained"
        if self.adapts:
            covered = f"LoRA on {of_all}"
        if self.adapts_router:
            covered += " and on the router"
        return f"{self.a_layer} x {self.layers} layers, {covered}"

    @property
    def advice(self) -> str:
        """The keys that put an adapter on all of them."""
        linear = [name.split(".")[-2] for name in self.weights if name.endswith(".weight")]
        if linear:
            return f"add {', '.join(dict.fromkeys(linear))} to lora_target_modules"
        names = dict.fromkeys(".".join(name.split(".")[-3:]) for name in self.weights)
        return f"write lora_target_parameters: [{', '.join(names)}] and lora_dropout: 0.0"

    def notes(self) -> Iterator[str]:
        """What a person should know before the run."""
        if self.adapts and not self.trained:
            yield f"LoRA is on none of the experts; to train them, {self.advice}"


def names_experts(name: str) -> bool:
    """Whether a layer or parameter that a recipe names is one of the experts."""
    return _EXPERTS.search(name) is not None


def without_adapter(name: str) -> str:
    """A layer's name without what peft puts around and into it."""
    for part in (".base_layer", ".original_module", ".modules_to_save.default"):
        name = name.replace(part, "")
    return name


def count_experts(model: Any) -> Experts | None:
    """The experts of a model, with its adapter if it has one; None for a model without."""
    adapted = {id(weight) for weight in _adapted_weights(model)}
    is_trained: dict[str, bool] = {}
    adapts_router = False
    for name, parameter in model.named_parameters():
        is_covered = parameter.requires_grad or id(parameter) in adapted
        if _ROUTER.search(name):
            adapts_router |= id(parameter) in adapted
        elif ".experts." in name and ".lora_" not in name and not name.endswith("bias"):
            plain = without_adapter(name)
            is_trained[plain] = is_covered or is_trained.get(plain, False)
    if not is_trained:
        return None
    config = model.config.get_text_config()
    counts = [getattr(config, name) for name in _COUNTS if getattr(config, name, None)]
    return Experts(
        a_layer=counts[0] if counts else "experts",
        layers=len({name.partition(".experts.")[0] for name in is_trained}),
        weights=list(is_trained),
        trained=sum(is_trained.values()),
        adapts=bool(adapted),
        adapts_router=adapts_router,
    )


def _adapted_weights(model: Any) -> Iterator[Any]:
    """The weights of the base that an adapter is on."""
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            yield module.get_param()
        elif isinstance(module, LoraLayer):
            yield module.get_base_layer().weight
