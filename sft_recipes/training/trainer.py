"""The hand-off to TRL: `SFTTrainer` with four additions and nothing else.

1. A loss, gradient or weight that is not finite stops the run before it reaches a file.
2. `evaluate()` adds generation metrics, so that `metric_for_best_model` can name them.
3. Where TRL computes logits at every position (CPU, MPS), they are computed at trained positions only. The loss and
   its gradients are TRL's; `tests/training/test_loss.py` holds them equal.
4. Checkpoints are sealed, and only sealed ones are rotated (`checkpoints.py`); the rows trained are counted.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch users know
from datasets import Dataset
from safetensors import SafetensorError
from trl import SFTTrainer

from sft_recipes.data.labels import IGNORE_INDEX
from sft_recipes.errors import InputError, Problem, TrainingFault
from sft_recipes.training.batching import keeps_rows_apart
from sft_recipes.training.callbacks import Preemption
from sft_recipes.training.checkpoints import begin_save, require_space, rotate, seal
from sft_recipes.training.consumption import Consumption
from sft_recipes.training.processes import on_main

GenerationMetrics = Callable[[Any], Mapping[str, float]]
SHOWN_ROWS = 8

# Names under which architectures scale or cap their logits; TRL knows them all, so its loss is used there.
_LOGIT_TRANSFORMS = "final_logit_softcapping logit_scale output_multiplier lm_head_multiplier logits_scaling".split()


class RecipeTrainer(SFTTrainer):
    """TRL's trainer for rows that already carry labels.

    `generation_metrics(model)` is called on every rank in `evaluate()` and returns plain numbers by name; where that
    would take more than `generation_share` of the whole run's time, it waits for a later evaluation (None: never).
    `rehearsal` is called before a first step; `facts` is what a checkpoint's manifest says about the run.
    """

    generation_metrics: GenerationMetrics | None = None
    generation_share: float | None = None
    rehearsal: Callable[[], None] | None = None
    preemption: Preemption | None = None
    consumption: Consumption | None = None
    facts: Mapping[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Lists of Python numbers took up to 12 times as long to put a batch together (benchmarks/gpu).
        self.train_dataset = _as_arrays(self.train_dataset)
        self.eval_dataset = _as_arrays(self.eval_dataset)
        # Transformers would remove any folder with a checkpoint's name, and only look at its time.
        self._keep_checkpoints, self.args.save_total_limit = self.args.save_total_limit, None
        self.trained_positions_only = self._can_skip_untrained_positions()
        self._finite_losses: list[
            torch.Tensor
        ] = []  # of each micro-step since the last optimizer step
        self._sum_at_start: torch.Tensor | None = None
        self._first_step: tuple[float, int] | None = (
            None  # when this process began its first step, and which it was
        )
        self.generation_seconds: list[float] = []

    def secure(
        self,
        facts: Mapping[str, Any],
        preemption: Preemption,
        consumption: Consumption,
        checkpoint: Path | None,
    ) -> None:
        """Before `train()`: what its checkpoints say, what ends it early, what counts rows, from `checkpoint` on."""
        self.facts, self.preemption, self.consumption = facts, preemption, consumption
        self.add_callback(preemption)
        if checkpoint is not None:
            self._total_train_tokens = consumption.load(
                checkpoint, self.accelerator.is_main_process
            )

    @property
    def _core(self) -> Any:
        """The unwrapped model; the library's annotation allows None, which a built trainer never has."""
        return self.model

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
        if not self.trained_positions_only:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        trained = targets != IGNORE_INDEX
        # A batch without any label still has to pass through the model on every rank; one position is enough.
        trained[0, 0] |= ~trained.any()
        targets = targets[trained]
        passed_on = {key: value for key, value in inputs.items() if key != "labels"}
        # In front of the output layer, not around the model: DDP and DeepSpeed see the forward pass they expect.
        head = self._core.get_output_embeddings()
        with head.register_forward_pre_hook(lambda _, hidden: (hidden[0][trained], *hidden[1:])):
            outputs = model(**passed_on, use_cache=False)
        total = F.cross_entropy(
            outputs.logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        count = (
            (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        )
        loss = total / torch.as_tensor(count).clamp(min=1)
        # As in TRL: the count is over all ranks, and DDP averages gradients over them.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        self._record_metrics(inputs, outputs.logits, targets)
        return (loss, outputs) if return_outputs else loss

    def _record_metrics(
        self, inputs: Mapping[str, Any], logits: torch.Tensor, targets: torch.Tensor
    ) -> None:
        """The numbers TRL logs beside the loss: token accuracy and tokens seen."""
        mode = "train" if self._core.training else "eval"
        trained = targets != IGNORE_INDEX
        correct = ((logits.detach().argmax(dim=-1) == targets) & trained).sum()
        tokens = (
            inputs["attention_mask"].sum()
            if "attention_mask" in inputs
            else inputs["input_ids"].numel()
        )
        counts = torch.tensor([int(correct), int(trained.sum()), int(tokens)], device=logits.device)
        counts = self.accelerator.gather_for_metrics(counts[None]).sum(dim=0)
        self._metrics[mode]["mean_token_accuracy"].append(
            (counts[0] / counts[1].clamp(min=1)).item()
        )
        if mode == "train":
            self._total_train_tokens += int(counts[2])
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """One micro-step; remembers its rows, and whether its loss was finite."""
        if self._first_step is None:
            self._first_step = time.monotonic(), self.state.global_step
            self._sum_at_start = self._sum_of_weights()
        if self.consumption is not None:
            self.consumption.count(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._finite_losses.append(torch.isfinite(loss.detach()).all())
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # Transformers calls this once before each optimizer step, with gradients already averaged over ranks; the
        # losses are each rank's own, so their verdict is shared before anyone steps, and with it whether to stop.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        broken = ~torch.stack(self._finite_losses)
        asked = self.preemption is not None and self.preemption.asked
        votes = torch.zeros(3, device=broken.device)
        votes[0], votes[1] = broken.any(), asked
        if self.consumption is not None:
            votes[2] = self.consumption.strangers
        loss_broken, stop, strangers = (
            self.accelerator.reduce(votes, reduction="sum").int().tolist()
        )
        if strangers:
            raise TrainingFault(
                f"step {self.state.global_step + 1}: {strangers} rows in it have other ids or labels than prepared "
                "and checked. This run ends and nothing was saved. Fix: use the versions in constraints.txt, and train "
                "without what changes rows between preparation and model."
            )
        # With fp16 an infinite norm is routine: the loss scaler leaves the step out and lowers its scale.
        scaled = norm is None or self.accelerator.mixed_precision == "fp16"
        if loss_broken or not (scaled or bool(torch.isfinite(torch.as_tensor(norm)).all())):
            self._refuse_step(
                "loss" if loss_broken else "gradient norm", broken | (not loss_broken)
            )
        self._finite_losses.clear()
        if self.consumption is not None:
            self.consumption.step.clear()
        if self.preemption is not None:
            self.preemption.agreed |= stop
        return norm

    def _refuse_step(self, what: str, guilty: torch.Tensor) -> None:
        # DeepSpeed's engine steps inside backward, before this is called.
        taken = (
            "This run ends and"
            if self.is_deepspeed_enabled
            else "No weight was changed by this step and"
        )
        rows = (
            self.consumption.rows_of_step(guilty.tolist()) if self.consumption is not None else []
        )
        raise TrainingFault(
            f"step {self.state.global_step + 1}: the {what} is not finite. {taken} nothing was saved. "
            f"Its {len(rows)} rows: {', '.join(rows[:SHOWN_ROWS])}{' ...' * (len(rows) > SHOWN_ROWS)}. "
            "Fix: lower learning_rate, check these rows, or train in float32."
        )

    def _sum_of_weights(self) -> torch.Tensor:
        """Over what is trained, of this rank's part where it is partitioned. No weight that is not finite hides in it,
        and no update leaves it as it was.
        """
        parts = [
            getattr(one, "ds_tensor", one).detach()
            for one in self._core.parameters()
            if one.requires_grad
        ]
        parts = [one.to_local() if hasattr(one, "to_local") else one for one in parts]
        exact = (
            torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        )  # which MPS has not
        return torch.stack(
            [one.sum(dtype=exact).to(self.accelerator.device) for one in parts]
        ).sum()

    def _require_sound_weights(self, changed: bool) -> None:
        """Raise TrainingFault on all ranks if a weight is not finite or, at the end, if all steps changed nothing."""
        now, start = self._sum_of_weights(), self._sum_at_start
        votes = torch.stack(
            [
                ~now.isfinite(),
                torch.ones_like(now) if start is None or not changed else now != start,
            ]
        )
        broken, any_changed = (self.accelerator.reduce(votes.float(), reduction="sum") > 0).tolist()
        if broken or not any_changed:
            what = "a weight is not finite" if broken else "no weight has changed since the start"
            fix = (
                "lower learning_rate or train in float32"
                if broken
                else "raise learning_rate or set dtype: float32"
            )
            raise TrainingFault(
                f"step {self.state.global_step}: {what}. Nothing was saved. Fix: {fix}."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """TRL's, once the weights are sound."""
        self._require_sound_weights(
            changed=not _internal_call
        )  # early steps of a warm-up may change nothing
        with self._written():
            super().save_model(output_dir, _internal_call=_internal_call)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        total = None if self.consumption is None else self.consumption.total(self.accelerator)
        on_main(lambda: begin_save(folder, self._bytes()))
        with self._written():
            super()._save_checkpoint(model, trial)
            if (
                self.consumption is not None
                and total is not None
                and self.accelerator.is_main_process
            ):
                self.consumption.save(folder, total, self._total_train_tokens)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                seal(folder, {**self.facts, "step": self.state.global_step})
                rotate(folder.parent, self._keep_checkpoints, self.state.best_model_checkpoint)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._first_step is None and self.padding_free:
            self._require_rows_apart()
        if self.state.global_step == 0 and self.rehearsal is not None:
            self.rehearsal()
        # A run resumed after its last step would take one more of them.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _require_rows_apart(self) -> None:
        """Raise InputError if rows of one flattened batch see one another; asked of the model as it is trained."""
        pad_token_id: Any = self.processing_class.pad_token_id  # type: ignore[union-attr]
        if not keeps_rows_apart(self.model_wrapped, self.args.device, pad_token_id):
            key = "packing" if getattr(self.args, "packing", False) else "padding_free"
            what = f"{type(self.accelerator.unwrap_model(self.model)).__name__} lets rows of one pack see one another"
            raise InputError(Problem("recipe", key, what, "remove the key"))

    def _bytes(self) -> int:
        """About what a checkpoint takes: all weights or the adapter's, and two moments of those that are trained."""
        sizes = [(getattr(one, "ds_numel", one.numel()), one) for one in self._core.parameters()]
        saved = [
            (size, one)
            for size, one in sizes
            if one.requires_grad or not hasattr(self._core, "peft_config")
        ]
        return sum(size * (one.element_size() + 8 * one.requires_grad) for size, one in saved)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """A file that cannot be written ends the run with a message; torch and safetensors say it as they like."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            require_space(Path(str(self.args.output_dir)), self._bytes())
            text = (
                f"step {self.state.global_step}: saving to {self.args.output_dir} failed: {error}"
            )
            raise TrainingFault(
                f"{text}. Earlier checkpoints are intact. Fix: mend that and run it again."
            ) from error

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation loss plus generation metrics, under the same prefix."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self.generation_metrics is not None and self._has_time_to_generate():
            prefix = kwargs.get("metric_key_prefix", "eval")
            started = time.monotonic()
            generated = {
                f"{prefix}_{name}": value
                for name, value in self.generation_metrics(self.model).items()
            }
            self.generation_seconds.append(time.monotonic() - started)
            metrics.update(generated)
            self.log(generated)
        return metrics

    def _has_time_to_generate(self) -> bool:
        """Whether generating once more stays within its share of the time that the whole run is going to take.

        The first time is always taken, since nothing is known yet, and so is every time where the best model depends
        on it. All ranks come to the same answer.
        """
        if self.generation_share is None or self._first_step is None or not self.generation_seconds:
            return True
        started, first = self._first_step
        spent, once = sum(self.generation_seconds), self.generation_seconds[-1]
        training = time.monotonic() - started - spent
        whole = training * (self.state.max_steps - first) / max(self.state.global_step - first, 1)
        too_much = torch.tensor(
            float(spent + once > self.generation_share * (whole + spent + once))
        )
        return not self.accelerator.reduce(
            too_much.to(self.accelerator.device), reduction="sum"
        ).item()


def _as_arrays(rows: Any) -> Any:
    """The rows as numpy arrays, where there are rows; several eval sets by name stay a mapping."""
    return rows.with_format("numpy") if isinstance(rows, Dataset) else rows
