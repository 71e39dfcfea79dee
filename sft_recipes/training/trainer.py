"""The hand-off to TRL: `SFTTrainer` with three additions and nothing else.

1. A loss that is not finite, or a gradient that is not, stops the run before the optimizer takes the step.
2. `evaluate()` adds generation metrics, so that `metric_for_best_model` can name them.
3. Where TRL computes logits at every position (CPU, MPS), they are computed at trained positions only. The loss and
   its gradients are TRL's; `tests/training/test_loss.py` holds them equal.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch users know
from trl import SFTTrainer

from sft_recipes.data.labels import IGNORE_INDEX
from sft_recipes.errors import TrainingFault

GenerationMetrics = Callable[[Any], Mapping[str, float]]

# Names under which architectures scale or cap their logits; TRL knows them all, so its loss is used there.
_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


class RecipeTrainer(SFTTrainer):
    """TRL's trainer for rows that already carry labels.

    `generation_metrics(model)` is called on every rank in `evaluate()` and returns plain numbers by name; where that
    would take more than `generation_share` of the whole run's time, it waits for a later evaluation (None: never).
    """

    generation_metrics: GenerationMetrics | None = None
    generation_share: float | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trained_positions_only = self._can_skip_untrained_positions()
        self._losses_are_finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        self._first_step: tuple[float, int] | None = None  # when this process began its first step, and which it was
        self.generation_seconds: list[float] = []

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
        total = F.cross_entropy(outputs.logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
        count = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count).clamp(min=1)
        # As in TRL: the count is over all ranks, and DDP averages gradients over them.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        self._record_metrics(inputs, outputs.logits, targets)
        return (loss, outputs) if return_outputs else loss

    def _record_metrics(self, inputs: Mapping[str, Any], logits: torch.Tensor, targets: torch.Tensor) -> None:
        """The numbers TRL logs beside the loss: token accuracy and tokens seen."""
        mode = "train" if self._core.training else "eval"
        trained = targets != IGNORE_INDEX
        correct = ((logits.detach().argmax(dim=-1) == targets) & trained).sum()
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        counts = torch.tensor([int(correct), int(trained.sum()), int(tokens)], device=logits.device)
        counts = self.accelerator.gather_for_metrics(counts[None]).sum(dim=0)
        self._metrics[mode]["mean_token_accuracy"].append((counts[0] / counts[1].clamp(min=1)).item())
        if mode == "train":
            self._total_train_tokens += int(counts[2])
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-step; remembers whether every loss since the last optimizer step was finite."""
        if self._first_step is None:
            self._first_step = time.monotonic(), self.state.global_step
        loss = super().training_step(*args, **kwargs)
        self._losses_are_finite &= torch.isfinite(loss.detach()).all()
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # Transformers calls this once before each optimizer step, with gradients already averaged over ranks; the
        # losses are each rank's own, so their verdict is shared before anyone steps.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        finite = self.accelerator.reduce(self._losses_are_finite.float(), reduction="sum")
        self._losses_are_finite.fill_(True)
        losses_finite = int(finite) == self.accelerator.num_processes
        # With fp16 an infinite norm is routine: the loss scaler leaves the step out and lowers its scale.
        scaled = norm is None or self.accelerator.mixed_precision == "fp16"
        norm_finite = scaled or bool(torch.isfinite(torch.as_tensor(norm)).all())
        if not (losses_finite and norm_finite):
            what = "loss" if not losses_finite else "gradient norm"
            # DeepSpeed's engine steps inside backward, before this is called.
            taken = "This run ends and" if self.is_deepspeed_enabled else "No weight was changed by this step and"
            raise TrainingFault(
                f"step {self.state.global_step + 1}: the {what} is not finite. {taken} nothing was saved. "
                "Fix: lower learning_rate, check the rows of this step, or train in float32."
            )
        return norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's evaluation loss plus generation metrics, under the same prefix."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self.generation_metrics is not None and self._has_time_to_generate():
            prefix = kwargs.get("metric_key_prefix", "eval")
            started = time.monotonic()
            generated = {f"{prefix}_{name}": value for name, value in self.generation_metrics(self.model).items()}
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
        too_much = torch.tensor(float(spent + once > self.generation_share * (whole + spent + once)))
        return not self.accelerator.reduce(too_much.to(self.accelerator.device), reduction="sum").item()
