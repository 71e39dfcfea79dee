"""Learning rates: what is usual for a model of some size, and what to begin with."""

from dataclasses import dataclass

# Below this, models take higher rates, and training all weights fits an ordinary machine.
SMALL_MODEL = 500_000_000
_SMALLEST = 200_000_000


@dataclass(frozen=True, slots=True)
class UsualRange:
    """What a number usually is, both ends included."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether it lies within."""
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Rates:
    """A rate for each way of training."""

    full: float
    lora: float

    def of(self, lora: bool) -> float:
        """The one for LoRA, or for all weights."""
        return self.lora if lora else self.full


# The chapter's range, 1e-5 to 5e-5, and what 8B recipes of open-instruct and torchtune take, 5e-6;
# LoRA takes about ten times the rate (TRL docs, peft_integration; "LoRA Without Regret", Thinking
# Machines 2025).
_FULL = UsualRange(5e-6, 5e-5)
_LORA = UsualRange(1e-4, 5e-4)
# alignment-handbook trains all of SmolLM2-360M at 1e-3. The quickstart's model of 1.4 million
# parameters takes 5e-3 with LoRA.
_FULL_SMALL = UsualRange(1e-5, 1e-3)
_LORA_SMALL = UsualRange(1e-4, 5e-3)


def usual_rates(lora: bool, parameters: int) -> UsualRange:
    """The usual learning rates for a model with so many parameters."""
    if parameters < SMALL_MODEL:
        return _LORA_SMALL if lora else _FULL_SMALL
    return _LORA if lora else _FULL


def first_rates(parameters: int | None) -> Rates:
    """Rates to begin with; `parameters` None: not known, so those that large models take.

    The best of those tried on real weights, one epoch of 2,000 rows, 160 validation rows:
    SmolLM2-135M below 200 million parameters, Gemma-3-270m above. For others the middle of what is
    usual.
    """
    if parameters is None or parameters >= SMALL_MODEL:
        return Rates(full=2e-5, lora=2e-4)
    if parameters >= _SMALLEST:
        return Rates(full=3e-5, lora=1e-3)
    return Rates(full=1e-4, lora=2e-3)
