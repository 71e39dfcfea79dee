"""A run as it lies on the disk: its model, its newest checkpoint, its base, its log."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache

from sft_recipes import run_folder
from sft_recipes.data.chat_templates import ChatRenderer, first_questions
from sft_recipes.data.opening import load_tokenizer
from sft_recipes.data.template_trial import try_template
from sft_recipes.doctor.finding import NotSeen
from sft_recipes.doctor.training_log import TrainingLog, read_training_log
from sft_recipes.doctor.weight_files import Tensor, Weights, read_adapter, read_model
from sft_recipes.errors import InputError, Problem
from sft_recipes.model_folder import (
    ADAPTER_CONFIG,
    CONFIG,
    checkpoints,
    holds_model,
    holds_tokenizer,
    model_of,
)
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.text_files import RESTORE, read_json

if TYPE_CHECKING:
    from sft_recipes.doctor.survey import TensorFacts

GENERATION_CONFIG = "generation_config.json"
# Where axolotl and this project put the merged model of a run.
_MERGED = ("merged", "export")


@dataclass(frozen=True)
class Run:
    """A run as it was named, and the folder in it that holds its model.

    `named_base` and `named_merged`: folders that the user named; `progress`: show a bar.
    """

    folder: Path
    model: Path
    named_base: Path | None = None
    named_merged: Path | None = None
    progress: bool = False

    @cached_property
    def adapter(self) -> Mapping[str, Any] | None:
        """What `adapter_config.json` says, if the run is an adapter."""
        return _read_if_there(self.model / ADAPTER_CONFIG)

    @cached_property
    def weights(self) -> Weights:
        """The whole model's, none where the run is an adapter alone."""
        return read_model(self.model)

    @cached_property
    def adapter_weights(self) -> Weights:
        """The adapter's, none where the run is a whole model."""
        return read_adapter(self.model)

    def require_whole(self) -> Weights:
        """All weights of a whole model. Raises NotSeen where files of it are missing."""
        if not self.weights.tensors:
            raise NotSeen("no whole model is here")
        if self.weights.faults:
            raise NotSeen("the weights are not whole")
        return self.weights

    @property
    def kind(self) -> str:
        """What the run is, in words."""
        place = ""
        if self.model != self.folder:
            place = f", looked at in {self.model.name}"
        if self.adapter is None:
            return f"a whole model{place}"
        name = self.adapter.get("peft_type", "adapter")
        if self.weights.files:
            return f"a whole model with a {name} adapter beside it{place}"
        return f"a {name} adapter{place}"

    # -- the model before training ---------------------------------------------------------------

    @cached_property
    def base_name(self) -> str | None:
        """What the run calls its base, if it says so."""
        if self.named_base is not None:
            return str(self.named_base)
        if self.adapter is not None:
            name = self.adapter.get("base_model_name_or_path")
            return name if isinstance(name, str) and name else None
        if run_folder.is_run_folder(self.folder):
            return load_recipe(self.folder / run_folder.RECIPE).model_name
        return None

    @cached_property
    def base(self) -> Path | None:
        """The folder of the base, if it is here; of one of the Hub, that of an earlier download."""
        name = self.base_name
        if name is None:
            return None
        if (Path(name) / CONFIG).is_file():
            return Path(name)
        if run_folder.looks_local(name):
            return None
        try:
            config = try_to_load_from_cache(name, CONFIG)
        except ValueError:  # no name that the Hub could have
            return None
        return Path(config).parent if isinstance(config, str) else None

    def require_base(self) -> Path:
        """The folder of the base. Raises NotSeen where it is not here."""
        if self.base is not None:
            return self.base
        if self.base_name is None:
            raise NotSeen("the run does not say what its base was: add --base FOLDER")
        raise NotSeen(f"the base {self.base_name} is not here: add --base FOLDER")

    @cached_property
    def base_weights(self) -> Weights:
        """The base's; raises NotSeen where it is not here."""
        return read_model(self.require_base())

    @property
    def merged(self) -> Path | None:
        """The folder of the merged model, if one was named or lies inside the run."""
        if self.named_merged is not None:
            return self.named_merged
        for name in _MERGED:
            if (self.folder / name / CONFIG).is_file():
                return self.folder / name
        return None

    @cached_property
    def facts(self) -> list["TensorFacts"]:
        """What is seen of the whole model's tensors, beside those of its base where that is here."""
        from sft_recipes.doctor.survey import survey

        base: Mapping[str, Tensor] = {}
        if self.weights.files and self.base not in (None, self.model):
            base = self.base_weights.tensors
        return survey(self.weights.tensors, base, self.progress)

    @cached_property
    def adapter_facts(self) -> list["TensorFacts"]:
        """What is seen of the adapter's tensors."""
        from sft_recipes.doctor.survey import survey

        return survey(self.adapter_weights.tensors, {}, self.progress)

    # -- what is served ---------------------------------------------------------------------------

    @cached_property
    def configs(self) -> Path:
        """The folder whose configurations a server reads: of an adapter alone its base's, even where
        axolotl put a copy of `config.json` beside it. Raises NotSeen.
        """
        is_whole = self.adapter is None or bool(self.weights.files)
        is_there = (self.model / CONFIG).is_file()
        if is_there and (is_whole or self.base is None):
            return self.model
        return self.require_base()

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the model."""
        return read_json(self.configs / CONFIG, RESTORE)

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """That of its language model, where it is a part of a larger one."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """What `generation_config.json` says, nothing where there is none."""
        return _read_if_there(self.configs / GENERATION_CONFIG) or {}

    @cached_property
    def tokenizer_folder(self) -> Path | None:
        """Where the run's own tokenizer was saved."""
        for folder in (self.model, self.folder):
            if holds_tokenizer(folder):
                return folder
        return None

    @cached_property
    def tokenizer(self) -> Any:
        """The run's own tokenizer. Raises NotSeen where there is none, InputError for a damaged one."""
        if self.tokenizer_folder is None:
            raise NotSeen("no tokenizer was saved with the run")
        return load_tokenizer(str(self.tokenizer_folder))

    @cached_property
    def base_tokenizer(self) -> Any:
        """The base's tokenizer. Raises NotSeen where it is not here."""
        folder = self.require_base()
        if not holds_tokenizer(folder):
            raise NotSeen(f"no tokenizer lies in {folder}")
        return load_tokenizer(str(folder))

    @cached_property
    def renderer(self) -> ChatRenderer:
        """Renders with the tokenizer and its own template. Raises NotSeen where there is none, InputError
        for one that does not render, or does not end.
        """
        if not self.tokenizer.chat_template:
            raise NotSeen("there is no chat template")
        renderer = ChatRenderer(self.tokenizer)
        renderer.template_place = str(self.template_place)
        try_template(renderer, first_questions)
        return renderer

    @property
    def template_place(self) -> Path:
        """The file that the chat template stands in, or should."""
        folder = self.tokenizer_folder or self.model
        file = folder / "chat_template.jinja"
        return file if file.is_file() else folder / "tokenizer_config.json"

    # -- the log ------------------------------------------------------------------------------------

    @cached_property
    def log(self) -> TrainingLog | None:
        """What was logged while it was trained, if that is here."""
        return read_training_log(self.folder, self.model)


def open_run(
    folder: Path, base: Path | None = None, merged: Path | None = None, progress: bool = False
) -> Run:
    """The run in a folder. Raises InputError for a folder that holds nothing of one."""
    fix = "name the output folder of a training run, or one of its checkpoints"
    if not folder.is_dir():
        raise InputError(Problem(str(folder), "", "this is no folder", fix))
    for option, named in (("--base", base), ("--merged", merged)):
        if named is not None and not (named / CONFIG).is_file():
            what = f"{named} holds no model ({CONFIG} is missing)"
            raise InputError(Problem("command line", option, what, "name a model's folder"))
    model = model_of(folder)
    if not holds_model(model):
        paths = checkpoints(folder)
        if paths:
            model = paths[-1]
        elif read_training_log(folder, folder) is None and not read_model(folder).files:
            raise InputError(Problem(str(folder), "", "holds nothing of a training run", fix))
    return Run(folder, model, base, merged, progress)


def _read_if_there(path: Path) -> dict[str, Any] | None:
    return read_json(path, RESTORE) if path.is_file() else None
