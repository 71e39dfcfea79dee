"""TRL's trainer with names for the moments that it has none for (transformers 5.23, TRL 1.16)."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer


class TrainerWithMoments(SFTTrainer):
    """`SFTTrainer`, and four moments of a run to override: they do nothing here.

    Callbacks would be the public way. None is called with the gradient norm, around a save, or in time to leave out
    an epoch, and an error that one raises in a save finds files half written.
    """

    _has_begun = False

    def before_first_step(self) -> None:
        """Called once in each process: the model is wrapped and on its device, a checkpoint is loaded."""

    def before_optimizer_step(self, gradient_norm: Any) -> None:
        """Called once a step with the norm over all ranks (None: not known), before a weight changes.

        DeepSpeed's engine has already stepped by then: it does so inside `backward`.
        """

    def around_checkpoint(self, folder: Path) -> AbstractContextManager[None]:
        """Entered before the first file of a checkpoint and left after its last, on every rank."""
        return nullcontext()

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on over all ranks, which TRL logs as `num_tokens` and forgets when a run is resumed."""
        return int(self._total_train_tokens)

    @tokens_seen.setter
    def tokens_seen(self, count: int) -> None:
        self._total_train_tokens = count

    def note_batch(self, accuracy: float, tokens: int) -> None:
        """Log what TRL's own `compute_loss` logs, for a loss that is computed without it.

        `accuracy` is the share of trained tokens that are the model's first choice, `tokens` those of the batch over
        all ranks; in training they are counted.
        """
        training = self.model is not None and self.model.training
        metrics = self._metrics["train" if training else "eval"]
        metrics["mean_token_accuracy"].append(accuracy)
        if training:
            self.tokens_seen += tokens
        metrics["num_tokens"] = [self.tokens_seen]

    def forget_evaluation(self) -> None:
        """Drop what batches of an evaluation noted: it was none that counts."""
        self._metrics["eval"].clear()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The last thing before an epoch's batches. A run resumed after its last step would take one more of them.
        if not self._has_begun:
            self._has_begun = True
            self.before_first_step()
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.before_optimizer_step(norm)
        return norm

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        with self.around_checkpoint(folder):
            super()._save_checkpoint(model, trial)
