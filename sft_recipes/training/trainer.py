"""The hand-off to TRL: `SFTTrainer` with four additions and nothing else.

1. A loss, gradient or weight that is not finite stops the run before it reaches a file.
2. `evaluate()` adds generation metrics, so that `metric_for_best_model` can name them.
3. Where TRL computes logits at every position (CPU, MPS), they are computed at trained positions only. The loss and
   its gradients are TRL's; `tests/training/test_loss.py` holds them equal.
4. Checkpoints are sealed, and only sealed ones are rotated (`checkpoints.py`); the rows trained are counted.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch users know
from datasets import Dataset
from safetensors import SafetensorError
from transformers.trainer_utils import EvalLoopOutput

from sft_recipes.data.labels import IGNORE_INDEX
from sft_recipes.errors import InputError, Problem, TrainingFault
from sft_recipes.training.batching import AUTOCAST, isolation_fault
from sft_recipes.training.callbacks import Preemption
from sft_recipes.training.checkpoints import begin_save, require_space, rotate, seal
from sft_recipes.training.consumption import Consumption
from sft_recipes.training.data_set_losses import DataSetLosses
from sft_recipes.training.precision import precision_of
from sft_recipes.training.processes import on_main
from sft_recipes.training.weights import checkpoint_bytes, sum_of_trained
from sft_recipes.upstream.trainer import TrainerWithMoments

GenerationMetrics = Callable[[Any], Mapping[str, float]]
SHOWN_ROWS = 8

# Names under which architectures scale or cap their logits; TRL knows them all, so its loss is used there.
_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


@dataclass(frozen=True)
class Guards:
    """What watches over a run; a trainer without them just trains.

    `checkpoint`: where the run goes on. `facts`: what a checkpoint's manifest says about the run. `rehearse` is called
    before a first step: what would break the first evaluation, hours later, breaks there.
    """

    preemption: Preemption | None = None
    consumption: Consumption | None = None
    checkpoint: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    rehearse: Callable[[Any], None] | None = None


class RecipeTrainer(TrainerWithMoments):
    """TRL's trainer for rows that already carry labels.

    `generation_metrics(model)` is called on every rank in `evaluate()` and returns plain numbers by name; where that
    would take more than `generation_share` of the whole run's time, it waits for a later evaluation (None: never).
    `data_set_losses`: held-out rows are of several data sets, and each gets its loss.
    """

    def __init__(
        self,
        *args: Any,
        guards: Guards | None = None,
        generation_metrics: GenerationMetrics | None = None,
        generation_share: float | None = None,
        data_set_losses: DataSetLosses | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # Lists of Python numbers took 1.1 to 12 times as long to put a batch together, most where
        # rows are packed (benchmarks/gpu measures it).
        self.train_dataset = _as_arrays(self.train_dataset)
        self.eval_dataset = _as_arrays(self.eval_dataset)
        # Transformers would remove any folder with a checkpoint's name, and only look at its time.
        self._checkpoints_kept = self.args.save_total_limit
        self.args.save_total_limit = None
        self.trained_positions_only = self._can_skip_untrained_positions()
        self.generation_metrics = generation_metrics
        self.generation_share = generation_share
        self.generation_seconds: list[float] = []
        self.data_set_losses = data_set_losses
        self._finite_losses: list[
            torch.Tensor
        ] = []  # of each micro-step since the last optimizer step
        self._sum_at_start: torch.Tensor | None = None
        # When this process began its first step, and which one it was.
        self._first_step: tuple[float, int] | None = None
        self._guards = guards or Guards()
        self.consumption = self._guards.consumption
        if self._guards.preemption is not None:
            self.add_callback(self._guards.preemption)
        if self.consumption is not None and self._guards.checkpoint is not None:
            is_main = self.accelerator.is_main_process
            self.tokens_seen = self.consumption.load(self._guards.checkpoint, is_main)

    @property
    def _core(self) -> Any:
        """The unwrapped model; the library's annotation allows None, which a built trainer never has."""
        return self.model

    # -- the loss ------------------------------------------------------------------------------------------------

    def _can_skip_untrained_positions(self) -> bool:
        """Whether the plain cross-entropy over trained positions equals TRL's loss here, and TRL's is the slow one."""
        config = self._core.config.get_text_config()
        return (
            self.accelerator.device.type in ("cpu", "mps")
            and getattr(self.args, "loss_type", None) == "nll"
            and not self.aux_loss_enabled
            and self.accelerator.parallelism_config is None
            and all(getattr(config, name, None) is None for name in _LOGIT_TRANSFORMS)
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss, with logits computed only where a label follows."""
        told = None if self._core.training else self.data_set_losses
        if not self.trained_positions_only:
            noting: Any = contextlib.nullcontext()
            if told is not None:
                noting = told.noting(model, inputs, getattr(self.args, "loss_type", "nll"))
            with noting:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        trained = targets != IGNORE_INDEX
        # A batch without any label still has to pass through the model on every rank; one position is enough.
        trained[0, 0] |= ~trained.any()
        targets = targets[trained]
        without_labels = dict(inputs)
        del without_labels["labels"]
        # In front of the output layer, not around the model: DDP and DeepSpeed see the forward pass they expect.
        head = self._core.get_output_embeddings()
        with head.register_forward_pre_hook(lambda _, hidden: (hidden[0][trained], *hidden[1:])):
            outputs = model(**without_labels, use_cache=False)
        logits = outputs.logits
        of_tokens = F.cross_entropy(
            logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none"
        )
        if told is not None:
            at_positions = of_tokens.new_zeros(trained.shape).masked_scatter(trained, of_tokens)
            told.add(inputs, at_positions[:, :-1])
        count: Any = num_items_in_batch
        if count is None:
            count = (targets != IGNORE_INDEX).sum()
        loss = of_tokens.sum() / torch.as_tensor(count).clamp(min=1)
        # As in TRL: the count is over all ranks, and DDP averages gradients over them.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        self._note_accuracy(inputs, logits, targets)
        return (loss, outputs) if return_outputs else loss

    def _note_accuracy(
        self, inputs: Mapping[str, Any], logits: torch.Tensor, targets: torch.Tensor
    ) -> None:
        """The numbers TRL logs beside the loss: token accuracy and tokens seen."""
        trained = targets != IGNORE_INDEX
        correct = (logits.detach().argmax(dim=-1) == targets) & trained
        tokens = inputs["input_ids"].numel()
        if "attention_mask" in inputs:
            tokens = inputs["attention_mask"].sum()
        counts = torch.tensor(
            [int(correct.sum()), int(trained.sum()), int(tokens)], device=logits.device
        )
        correct_count, trained_count, token_count = (
            self.accelerator.gather_for_metrics(counts[None]).sum(dim=0).tolist()
        )
        self.note_batch(correct_count / max(trained_count, 1), token_count)

    # -- the guard of every step ---------------------------------------------------------------------------------

    def before_first_step(self) -> None:
        """What cannot be asked before the model is where it is trained, and a checkpoint is loaded."""
        self._find_best_checkpoint()
        if self.padding_free:
            self._require_rows_apart()
        if self.state.global_step == 0 and self._guards.rehearse is not None:
            self._guards.rehearse(self)

    def _find_best_checkpoint(self) -> None:
        """A run folder may have been moved since the best checkpoint's path was noted: its name counts."""
        noted = self.state.best_model_checkpoint
        if noted is not None:
            here = Path(str(self.args.output_dir)) / Path(noted).name
            self.state.best_model_checkpoint = str(here)

    def _require_rows_apart(self) -> None:
        """Raise InputError if a row is not the same in a flattened batch as it is alone."""
        pad_token_id: Any = self.processing_class.pad_token_id  # type: ignore[union-attr]
        computes_in = AUTOCAST.get(self.accelerator.mixed_precision)
        fault = isolation_fault(self.model_wrapped, self.args.device, pad_token_id, computes_in)
        if not fault:
            return
        key = "packing" if getattr(self.args, "packing", False) else "padding_free"
        name = type(self.accelerator.unwrap_model(self.model)).__name__
        what = f"not for {name}: {fault}"
        raise InputError(Problem("recipe", key, what, "remove the key"))

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """One micro-step; remembers its rows, and whether its loss was finite."""
        if self._first_step is None:
            self._first_step = time.monotonic(), self.state.global_step
            self._sum_at_start = sum_of_trained(self._core, self.accelerator.device)
        if self.consumption is not None:
            self.consumption.count(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._finite_losses.append(torch.isfinite(loss.detach()).all())
        return loss

    def before_optimizer_step(self, gradient_norm: Any) -> None:
        """Raise TrainingFault on all ranks for a step that would spoil the weights, and agree on whether to stop.

        Gradients are already averaged over ranks; losses and rows are each rank's own, so their verdict is shared
        before anyone steps.
        """
        not_finite = ~torch.stack(self._finite_losses)
        preemption = self._guards.preemption
        votes = torch.zeros(3, device=not_finite.device)
        votes[0] = not_finite.any()
        if preemption is not None:
            votes[1] = preemption.asked
        if self.consumption is not None:
            votes[2] = self.consumption.strangers
        losses, stop, strangers = self.accelerator.reduce(votes, reduction="sum").int().tolist()
        if strangers:
            raise TrainingFault(
                f"step {self.state.global_step + 1}: {strangers} rows in it have other ids or labels than prepared "
                "and checked. This run ends and nothing was saved. Fix: use the versions in constraints.txt, and train "
                "without what changes rows between preparation and model."
            )
        if losses:
            self._refuse_step("loss", not_finite)
        if not self._is_sound(gradient_norm):
            self._refuse_step("gradient norm", torch.ones_like(not_finite))
        self._finite_losses.clear()
        if self.consumption is not None:
            self.consumption.step.clear()
        if preemption is not None:
            preemption.agreed |= stop

    def _is_sound(self, gradient_norm: Any) -> bool:
        # With fp16 an infinite norm is routine: the loss scaler leaves the step out and lowers its scale.
        if gradient_norm is None or self.accelerator.mixed_precision == "fp16":
            return True
        return bool(torch.isfinite(torch.as_tensor(gradient_norm)).all())

    def _refuse_step(self, what: str, guilty: torch.Tensor) -> None:
        """Raise TrainingFault. `guilty`: of each micro-step of this rank, whether its rows are to be named."""
        # DeepSpeed's engine steps inside backward, before this is called.
        taken = "No weight was changed by this step and"
        if self.is_deepspeed_enabled:
            taken = "This run ends and"
        rows: Sequence[str] = []
        if self.consumption is not None:
            rows = self.consumption.rows_of_step(guilty.tolist())
        shown = ", ".join(rows[:SHOWN_ROWS])
        if len(rows) > SHOWN_ROWS:
            shown += " ..."
        raise TrainingFault(
            f"step {self.state.global_step + 1}: the {what} is not finite. {taken} nothing was saved. "
            f"Its {len(rows)} rows: {shown}. "
            "Fix: lower learning_rate, check these rows, or train in float32."
        )

    # -- saving --------------------------------------------------------------------------------------------------

    def _require_sound_weights(self, at_the_end: bool) -> None:
        """Raise TrainingFault on all ranks if a weight is not finite or, at the end, if all steps changed nothing."""
        now = sum_of_trained(self._core, self.accelerator.device)
        changed = torch.ones_like(now)
        # Early steps of a warm-up may change nothing.
        if at_the_end and self._sum_at_start is not None:
            changed = (now != self._sum_at_start).to(now.dtype)
        votes = torch.stack([(~now.isfinite()).to(now.dtype), changed])
        broken, any_changed = (self.accelerator.reduce(votes, reduction="sum") > 0).tolist()
        if broken:
            what = "a weight is not finite"
            fix = "lower learning_rate or train in float32"
        elif not any_changed:
            what = "no weight has changed since the start"
            fix = "raise learning_rate or set dtype: float32"
        else:
            return
        raise TrainingFault(
            f"step {self.state.global_step}: {what}. Nothing was saved. Fix: {fix}."
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """TRL's, once the weights are sound."""
        self._require_sound_weights(at_the_end=not _internal_call)
        with self._write_errors_named():
            super().save_model(output_dir, _internal_call=_internal_call)

    @contextlib.contextmanager
    def around_checkpoint(self, folder: Path) -> Iterator[None]:
        """Mark the folder as unfinished before its first file, and seal it after the last."""
        total = None
        if self.consumption is not None:
            total = self.consumption.total(self.accelerator)
        on_main(lambda: begin_save(folder, checkpoint_bytes(self._core)))
        with self._write_errors_named():
            yield
            is_main = self.accelerator.is_main_process
            if self.consumption is not None and total is not None and is_main:
                self.consumption.save(folder, total, self.tokens_seen)
            self.accelerator.wait_for_everyone()
            if is_main:
                facts = {
                    **self._guards.facts,
                    "precision": precision_of(self.args),
                    "step": self.state.global_step,
                }
                seal(folder, facts)
                rotate(folder.parent, self._checkpoints_kept, self.state.best_model_checkpoint)

    @contextlib.contextmanager
    def _write_errors_named(self) -> Iterator[None]:
        """A file that cannot be written ends the run with a message; torch and safetensors say it as they like."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            folder = Path(str(self.args.output_dir))
            require_space(folder, checkpoint_bytes(self._core))
            text = f"step {self.state.global_step}: saving to {folder} failed: {error}"
            raise TrainingFault(
                f"{text}. Earlier checkpoints are intact. Fix: mend that and run it again."
            ) from error

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """TRL's; of several data sets each one's loss, too, as `eval_NAME_loss`."""
        told = self.data_set_losses
        if told is None:
            return super().evaluation_loop(*args, **kwargs)
        told.begin()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = dict(output.metrics or {})
        for name, loss in told.by_name(self.accelerator).items():
            metrics[f"{prefix}_{name}_loss"] = loss
        return output._replace(metrics=metrics)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation loss plus generation metrics, under the same prefix."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self.generation_metrics is not None and self._has_time_to_generate():
            prefix = kwargs.get("metric_key_prefix", "eval")
            started = time.monotonic()
            generated = {}
            for name, value in self.generation_metrics(self.model).items():
                generated[f"{prefix}_{name}"] = value
            self.generation_seconds.append(time.monotonic() - started)
            metrics.update(generated)
            self.log(generated)
        return metrics

    def _has_time_to_generate(self) -> bool:
        """Whether generating once more stays within its share of the time that the whole run is going to take.

        The first time is always taken, since nothing is known yet, and so is every time where the best model depends
        on it. All ranks come to the same answer.
        """
        unknown = self._first_step is None or not self.generation_seconds
        if self.generation_share is None or unknown:
            return True
        started, first_step = self._first_step or (0.0, 0)
        spent = sum(self.generation_seconds)
        next_time = self.generation_seconds[-1]
        training = time.monotonic() - started - spent
        steps_taken = max(self.state.global_step - first_step, 1)
        whole = training * (self.state.max_steps - first_step) / steps_taken
        too_much = spent + next_time > self.generation_share * (whole + spent + next_time)
        vote = torch.tensor(float(too_much), device=self.accelerator.device)
        return not self.accelerator.reduce(vote, reduction="sum").item()


def _as_arrays(rows: Any) -> Any:
    """The rows as numpy arrays, where there are rows; several eval sets by name stay a mapping."""
    return rows.with_format("numpy") if isinstance(rows, Dataset) else rows
