"""What a run will be made of, made in seconds before any row is read.

TRL's arguments, the model with its adapter (shapes alone, no weights), optimizer, schedule and
trackers are constructed as training constructs them, so that what one of these libraries refuses is
refused here, under the key that it is about, and not hours later. `check` and `train` both ask.
"""

import dataclasses
import math
import re
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    get_scheduler,
)
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import SchedulerType
from trl import SFTConfig, SFTTrainer

from sft_recipes.data.opening import check_base_folder, loading
from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.models import (
    check_quantization,
    clean_generation_config,
    freeze_unfed_encoders,
    model_dtype,
)
from sft_recipes.recipe import Recipe
from sft_recipes.training.arguments import REFUSALS, reason, sft_config
from sft_recipes.training.batching import check_stated_attention
from sft_recipes.training.evaluate_while_training import possible_metrics, require_metric
from sft_recipes.training.experts import count_experts, names_experts, without_adapter
from sft_recipes.training.start_adapter import peft_config, start_problem
from sft_recipes.training.trackers import sending_problems
from sft_recipes.training.varlen_attention import VARLEN

# Where the run's length is not known yet the schedule is made for this many steps.
_ASSUMED_STEPS = 1000
_LOOKED_AT_STEPS = 8
# Trackers that transformers knows and never lists as installed, or not beside another.
_NOT_LOOKED_FOR = ("azure_ml", "flyte")
# Which layers get an adapter, or are trained whole beside it.
_TARGETS = ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save")


def check_construction(
    recipe: Recipe, processes: int | None = None, elsewhere: bool = False
) -> Any:
    """Raise InputError for anything that could not be constructed; returns the model, of shapes
    without weights.

    `elsewhere`: the run is planned for other machines, so what is not installed here is no fault.
    """
    # Before TRL's arguments: while these live, transformers would partition the model under ZeRO-3.
    model = meta_model(recipe)
    check_stated_attention(recipe, _base_of(model))
    generation_notes(recipe)
    if not elsewhere:
        check_quantization(recipe)
    config = sft_config(recipe, processes)
    problems = [*_adapter_problems(recipe, model), *_start_problems(recipe, model)]
    problems += _model_problems(recipe, model, config)
    problems += _schedule_problems(recipe, config)
    if not elsewhere:
        problems += _optimizer_problems(recipe, model, config)
        problems += _tracker_problems(recipe, config)
        problems += _compiler_problems(recipe)
    if problems:
        raise InputError(problems)
    if recipe.training.get("eval_strategy", "no") != "no":
        place = recipe.place("metric_for_best_model")
        require_metric(config.metric_for_best_model, possible_metrics(recipe), place)
    return model


def _base_of(model: Any) -> Any:
    """The model without its adapter."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model


def generation_notes(recipe: Recipe) -> list[str]:
    """What will be left out of the base model's generation_config when it is saved, a line each.

    Raises InputError for one that cannot be read or not be saved whatever is left out.
    """
    name = recipe.model_name
    revision = recipe.model.get("model_revision", "main")
    with loading(name, "generation config"):
        try:
            config = GenerationConfig.from_pretrained(name, revision=revision)
        except OSError:
            return []  # many models have none
        return clean_generation_config(config, name)


# -- the model -------------------------------------------------------------------------------------


def meta_model(recipe: Recipe) -> Any:
    """The recipe's model with its adapter: shapes and types, no memory, nothing quantized.

    Raises InputError if its config cannot be read, or if the adapter does not fit it.
    """
    model = adapted(recipe, _meta_base(recipe))
    if recipe.model.get("load_in_8bit") or recipe.model.get("load_in_4bit"):
        # TRL trains adapters on quantized weights in bfloat16, others in float32.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _meta_base(recipe: Recipe) -> Any:
    """The same without an adapter."""
    check_base_folder(recipe)
    config = base_config(recipe.model_name, recipe.model.get("model_revision", "main"))
    with loading(recipe.model_name, "model"), torch.device("meta"):
        dtype = getattr(torch, model_dtype(recipe))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        freeze_unfed_encoders(model)
    _set_attention(recipe, model)
    return model


def base_config(model: str, revision: str = "main") -> Any:
    """A model's config, from its folder or the Hub."""
    with loading(model, "config"):
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)


def _set_attention(recipe: Recipe, model: Any) -> None:
    """The attention that the recipe names, if it is one of transformers' own."""
    key = "attn_implementation"
    name = recipe.model.get(key)
    # `paged|...` are for generation alone.
    is_own = name in AttentionInterface().valid_keys() and "|" not in str(name)
    # Kernels of the Hub and of packages are looked at in settings_checks.py; they are not loaded here.
    is_kernel = "/" in str(name) or "flash" in str(name)
    if name is None or is_kernel or name == VARLEN:
        return
    what = ""
    if name != "eager" and not is_own:
        what = f"transformers knows no attention {name!r}"
    what = what or _refusal(partial(model.set_attn_implementation, name))
    if what:
        raise InputError(
            Problem(recipe.place(key), key, what, "use sdpa or eager, or remove the key")
        )


def adapted(recipe: Recipe, model: Any, device: str = "meta") -> Any:
    """The model with the recipe's adapter, if it has one, made on `device`."""
    try:
        lora = peft_config(recipe, model)
        if lora is None:
            return model
        with torch.device(device), warnings.catch_warnings():
            # peft warns of names that match nothing; they are looked for below, and refused.
            warnings.simplefilter("ignore")
            return get_peft_model(model, lora)
    except REFUSALS as error:
        raise InputError(_not_adapted(recipe, model, reason(error))) from error


def _not_adapted(recipe: Recipe, model: Any, what: str) -> Problem:
    """What peft says of an adapter that cannot be built, under the key that it is most likely about."""
    key = "use_peft"
    fix = "name layers of this model, or remove the key"
    names: Sequence[str] = ()
    for target in ("lora_target_modules", "lora_target_parameters"):
        if recipe.model.get(target):
            key = target
            names = recipe.model[target]
    experts = count_experts(model)
    if experts and any(names_experts(name) for name in names):
        fix = experts.advice
    if "lora_dropout" in what:
        # all-linear reaches the experts of some mixtures, which are parameters.
        key = "lora_dropout"
        fix = "set it to 0.0, or name layers other than experts in lora_target_modules"
    if recipe.adapter_name:
        key = "adapter_name_or_path"
        fix = "name the adapter's base in model_name_or_path, or another adapter"
    return Problem(recipe.place(key), key, what, fix)


def _start_problems(recipe: Recipe, model: Any) -> Iterator[Problem]:
    """What keeps the run from going on from its adapter, whose layers the recipe may name, too."""
    if recipe.adapter_name is None:
        return
    problem = start_problem(recipe, model)
    if problem is not None:
        yield problem
    for key in _TARGETS:
        if recipe.model.get(key):
            asked = adapted(dataclasses.replace(recipe, adapter_name=None), _meta_base(recipe))
            if _trained_layers(asked) != _trained_layers(model):
                layers = ", ".join(_own_names(sorted(_trained_layers(model))))
                what = f"the adapter in {recipe.adapter_name} is on other layers ({layers})"
                yield Problem(recipe.place(key), key, what, "remove the key: the adapter decides")
            return


def _trained_layers(model: Any) -> set[str]:
    """The names of the layers that have an adapter or are trained whole."""
    names: set[str] = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            names.add(re.split(r"\.lora_|\.modules_to_save\.", name)[0])
    return names


def _adapter_problems(recipe: Recipe, model: Any) -> Iterator[Problem]:
    """Names of layers and parameters that match nothing; peft leaves them out with a warning."""
    if not recipe.model.get("use_peft"):
        return
    modules = [name for name, _ in model.named_modules()]
    known = dict.fromkeys(_TARGETS, modules)
    known["lora_target_parameters"] = [name for name, _ in model.named_parameters()]
    experts = count_experts(model)
    lora = model.peft_config["default"]
    for key in _TARGETS:
        asked = recipe.model.get(key) or ()
        for name in asked:
            fix = f"use some of {', '.join(_own_names(known[key]))}"
            if experts and names_experts(name):
                fix = experts.advice
            what = ""
            if names_experts(name) and not (experts and experts.trained):
                what = f"{name!r} names experts, and none gets an adapter"
            if not _is_pattern(key, asked) and not _is_among(name, known[key]):
                what = f"the model has no {name!r}"
            # Layers that older versions of transformers had, peft turns into parameters.
            is_translated = experts and name not in (lora.target_modules or ())
            if what and not (key == "lora_target_modules" and is_translated):
                yield Problem(recipe.place(key), key, what, fix)


def _is_pattern(key: str, names: Sequence[str]) -> bool:
    """Whether peft reads the names as a pattern: where there is one, and it is no plain name."""
    if key != "lora_target_modules" or len(names) > 1:
        return False
    return not names[0].replace(".", "").replace("_", "").isalnum() or names[0] == "all-linear"


def _is_among(name: str, known: Sequence[str]) -> bool:
    """Whether a name is that of a layer or the end of one; an adapter may lie in between."""
    plain = [without_adapter(other) for other in known]
    return any(other == name or other.endswith(f".{name}") for other in plain)


def _own_names(known: Sequence[str]) -> list[str]:
    """Last names of layers that a person would write, each once."""
    names: dict[str, None] = {}
    for name in known:
        last = without_adapter(name).rpartition(".")[2]
        if last and not last.isdigit() and "lora" not in name:
            names[last] = None
    return list(names)[-12:]


def _model_problems(recipe: Recipe, model: Any, config: SFTConfig) -> Iterator[Problem]:
    has_router = hasattr(model.config.get_text_config(), "output_router_logits")
    if config.router_aux_loss_coef and not has_router:
        what = "the model is no mixture of experts that tells how its rows are routed"
        key = "router_aux_loss_coef"
        yield Problem(recipe.place(key), key, what, "remove the key")


# -- optimizer, schedule, trackers -----------------------------------------------------------------


def _refusal(construct: Callable[[], Any]) -> str:
    """What a library says against constructing something; empty if it constructs it."""
    try:
        construct()
    except REFUSALS as error:
        return reason(error)
    return ""


def _dummy_optimizer(config: SFTConfig) -> torch.optim.Optimizer:
    """An optimizer for schedules, which only look at its learning rate."""
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)


def _schedule_problems(recipe: Recipe, config: SFTConfig) -> Iterator[Problem]:
    """Arguments that a schedule lacks or does not know, and rates that it would make nonsense of."""
    key = "lr_scheduler_type"
    if recipe.training.get("lr_scheduler_kwargs"):
        key = "lr_scheduler_kwargs"
    what = _refusal(lambda: _try_schedule(config))
    if what:
        name = SchedulerType(config.lr_scheduler_type).value
        fix = f"write what {name} needs in lr_scheduler_kwargs, or choose another lr_scheduler_type"
        yield Problem(recipe.place(key), key, what, fix)


def _try_schedule(config: SFTConfig) -> None:
    """Make the schedule and look at its rates. Raises what it raises, ValueError for a bad rate."""
    steps = _ASSUMED_STEPS
    if config.max_steps > 0:
        steps = config.max_steps
    warmup = config.get_warmup_steps(steps)
    if config.max_steps <= 0:
        steps = max(steps, 2 * warmup)
    schedule: Any = get_scheduler(
        config.lr_scheduler_type,
        optimizer=_dummy_optimizer(config),
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=typing.cast(dict[str, Any] | None, config.lr_scheduler_kwargs),
    )
    for factor_at in getattr(schedule, "lr_lambdas", ()):
        for part in range(_LOOKED_AT_STEPS + 1):
            step = steps * part // _LOOKED_AT_STEPS
            factor = factor_at(step)
            if isinstance(factor, complex) or not math.isfinite(factor) or factor < 0:
                rate = f"{factor} times learning_rate"
                raise ValueError(f"the rate would be {rate} at step {step} of {steps}")


def _optimizer_problems(recipe: Recipe, model: Any, config: SFTConfig) -> Iterator[Problem]:
    """Optimizers that are not installed, and arguments that they do not take."""
    what = _refusal(lambda: _try_optimizer(model, config))
    if what:
        key = "optim_args" if recipe.training.get("optim_args") else "optim"
        fix = "install what it needs, or choose another optim"
        if key == "optim_args":
            fix = "write NAME=VALUE,NAME=VALUE with arguments of this optim"
        yield Problem(recipe.place(key), key, what, fix)


def _try_optimizer(model: Any, config: SFTConfig) -> None:
    kind, settings = SFTTrainer.get_optimizer_cls_and_kwargs(config, model)
    is_plain = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if is_plain and not settings.keys() & {"params", "model", "optimizer_dict"}:
        kind([torch.nn.Parameter(torch.zeros(2, 2))], **settings)


def _tracker_problems(recipe: Recipe, config: SFTConfig) -> Iterator[Problem]:
    """Trackers that are unknown or not installed."""
    known = sorted(INTEGRATION_TO_CALLBACK)
    yield from sending_problems(recipe, list(config.report_to or ()))
    for name in config.report_to or ():
        place = recipe.place("report_to")
        if name not in known:
            fix = suggest(name, known)
            yield Problem(place, "report_to", f"there is no tracker {name!r}", fix)
        elif name not in get_available_reporting_integrations() and not _is_made(name):
            fix = f"pip install {name.replace('_', '-')}, or remove it from report_to"
            yield Problem(place, "report_to", f"{name} is not installed here", fix)


def _is_made(name: str) -> bool:
    """Whether a tracker can be made that transformers does not look for beforehand.

    Others are not made: what is not installed complains once more when it is taken down.
    """
    if name not in _NOT_LOOKED_FOR:
        return False
    return not _refusal(INTEGRATION_TO_CALLBACK[name])


def _compiler_problems(recipe: Recipe) -> Iterator[Problem]:
    name = recipe.training.get("torch_compile_backend")
    if name is None:
        return
    # Seconds to import, and hardly any recipe names one.
    from torch._dynamo import list_backends

    known = list_backends(exclude_tags=())
    if name not in known:
        key = "torch_compile_backend"
        what = f"torch knows no backend {name!r} here"
        yield Problem(recipe.place(key), key, what, f"use one of {', '.join(known)}")
