"""What the numbers of a run say: whether they are numbers, and whether training changed any."""

from collections.abc import Mapping

import torch
from transformers import AutoConfig

from sft_recipes.data.opening import loading
from sft_recipes.doctor.finding import Look, NotSeen, command
from sft_recipes.doctor.folder import Run
from sft_recipes.doctor.tensors import OpenFiles, spans
from sft_recipes.doctor.weight_files import Tensor
from sft_recipes.model_folder import ADAPTER_CONFIG, CONFIG


def weights_are_numbers(run: Run, look: Look) -> None:
    """No weight is NaN or infinite, as float16 becomes beyond 65,504, and no matrix of a whole model is all
    zeros.
    """
    facts = [*run.adapter_facts, *run.facts]
    if not facts:
        raise NotSeen("there are no weights that can be read")
    nan = [fact for fact in facts if fact.nans]
    infinite = [fact for fact in facts if fact.infinities]
    look.seen = f"{len(facts)} tensors"
    fix = "use a checkpoint from before, or train again in bfloat16 or at a lower learning rate"
    if nan:
        first = nan[0]
        what = f"{len(nan)} of {len(facts)} tensors hold NaN, such as {first.tensor.name}"
        why = "the model answers nothing but noise"
        look.find("error", first.tensor.file, what, why, fix)
    if infinite:
        first = infinite[0]
        what = f"{len(infinite)} of {len(facts)} tensors hold infinity, such as {first.tensor.name}"
        why = "its answers become NaN"
        if first.tensor.dtype == "F16":
            why = "float16 ends at 65,504, and larger weights overflowed when it was saved"
            fix = "save it again from the original weights in bfloat16 or float32"
        look.find("error", first.tensor.file, what, why, fix)
    _find_zeros(run, look)


def _find_zeros(run: Run, look: Look) -> None:
    zeros: list[Tensor] = []
    for fact in run.facts:
        if fact.is_zero and len(fact.tensor.shape) > 1 and not fact.equals_base:
            zeros.append(fact.tensor)
    if zeros:
        what = f"{len(zeros)} of {len(run.facts)} tensors are all zeros, such as {zeros[0].name}"
        why = "a sharded save left out what other processes held"
        fix = "save the model again from its shards, gathered on one process"
        look.find("error", zeros[0].file, what, why, fix)


def model_differs_from_base(run: Run, look: Look) -> None:
    """Training changed at least one weight of a whole model: bit for bit, in the precision of the run."""
    if not run.weights.files:
        raise NotSeen("no whole model is here")
    base = run.require_base()
    compared = [fact for fact in run.facts if fact.equals_base is not None]
    if not compared:
        raise NotSeen(f"no tensor of {base} has the names and shapes of the run's")
    equal = [fact for fact in compared if fact.equals_base]
    look.seen = f"{len(compared) - len(equal)} of {len(compared)} tensors differ from the base's"
    if len(equal) == len(compared):
        what = f"all {len(equal)} tensors are the base's, bit for bit"
        why = "nothing was trained: all was frozen, the rate was 0, or bfloat16 rounded every step away"
        look.find("error", run.weights.files[0], what, why, _other_checkpoint(run))


def _other_checkpoint(run: Run) -> str:
    look = command("doctor", run.folder / "checkpoint-N")
    return f"see whether a checkpoint holds what was trained, with {look}; else train again"


def adapter_has_effect(run: Run, look: Look) -> None:
    """The matrices of an adapter that begin as zeros (`lora_B`) are no longer zeros, and `lora_alpha` is not
    0.
    """
    if run.adapter is None:
        raise NotSeen("the run is no adapter")
    facts = run.adapter_facts
    if run.adapter.get("lora_alpha") == 0:
        what = "lora_alpha is 0"
        why = "the adapter is multiplied by 0, and the model answers as its base does"
        fix = "set lora_alpha to what it was trained with"
        look.find("error", run.model / ADAPTER_CONFIG, what, why, fix)
    # Of the two matrices of an embedding peft begins the other one with zeros.
    begun = [fact for fact in facts if "lora_B" in fact.tensor.name]
    begun += [fact for fact in facts if "lora_embedding_A" in fact.tensor.name]
    if not begun:
        raise NotSeen(
            f"no tensor tells whether a {run.adapter.get('peft_type')} adapter was trained"
        )
    zeros = [fact.tensor for fact in begun if fact.is_zero]
    look.seen = f"{len(begun) - len(zeros)} of {len(begun)} lora_B matrices were trained"
    if not zeros:
        return
    others = [fact for fact in facts if "lora_" not in fact.tensor.name]
    if len(zeros) < len(begun) or others:
        what = f"{len(zeros)} of {len(begun)} lora_B matrices are 0, such as {zeros[0].name}"
        why = "these modules got no gradient"
        fix = "leave them out of target_modules, or see why they are not reached"
        look.judge("note", zeros[0].file, what, why, fix)
        return
    what = f"all {len(zeros)} lora_B matrices are 0: the adapter changes nothing"
    why = "the model answers as its base does"
    look.find("error", zeros[0].file, what, why, _other_checkpoint(run))


def head_is_tied_as_said(run: Run, look: Look) -> None:
    """Embedding and head are one tensor where the configuration ties them, two where it does not; an adapter
    trains both of a tied pair, or neither.
    """
    if run.adapter is not None and not run.weights.files:
        _find_half_a_tie(run, look)
        return
    tensors = run.require_whole().tensors
    embeddings = _ending(tensors, ("embed_tokens.weight", "wte.weight"))
    heads = _ending(tensors, ("lm_head.weight",))
    if not embeddings:
        raise NotSeen("no embedding is known by its name in the weights")
    tied = is_tied(run)
    where = run.configs / CONFIG
    look.seen = f"tie_word_embeddings is {str(tied).lower()}, and {len(heads)} heads were saved"
    if not tied and not heads:
        what = "tie_word_embeddings is false, and no lm_head.weight was saved"
        why = "the head is filled with random numbers when it is loaded"
        fix = "set tie_word_embeddings to true if it was trained tied, or save the model again"
        look.find("error", where, what, why, fix)
    elif tied and heads and not _are_equal(embeddings[0], heads[0]):
        what = "tie_word_embeddings is true, and the saved lm_head.weight is not the embedding"
        why = "the head that was trained is thrown away when the model is loaded"
        fix = f"set tie_word_embeddings to false in {where}"
        look.find("error", where, what, why, fix)


def _find_half_a_tie(run: Run, look: Look) -> None:
    """An adapter that trains one of two that are the same tensor."""
    run.require_base()
    modules = str((run.adapter or {}).get("modules_to_save"))
    tied = is_tied(run)
    look.seen = f"the base ties them: {str(tied).lower()}"
    if tied and ("embed_tokens" in modules) != ("lm_head" in modules):
        what = f"modules_to_save is {modules}, and the base ties embedding and head"
        why = "merged into the base the one overwrites the other, or is lost when it is loaded"
        fix = 'train again with modules_to_save=["embed_tokens", "lm_head"] and ensure_weight_tying=True'
        look.judge("warning", run.model / ADAPTER_CONFIG, what, why, fix)


def is_tied(run: Run) -> bool:
    """Whether head and embedding are one tensor; what a configuration leaves open its class decides."""
    with loading(str(run.configs), "config"):
        config = AutoConfig.from_pretrained(run.configs, trust_remote_code=False)
    return bool(config.get_text_config().tie_word_embeddings or config.tie_word_embeddings)


def _ending(tensors: Mapping[str, Tensor], endings: tuple[str, ...]) -> list[Tensor]:
    return [tensor for name, tensor in tensors.items() if name.endswith(endings)]


def _are_equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    with OpenFiles() as files:
        for span in spans(one):
            if not torch.equal(files.rows(one, span), files.rows(other, span)):
                return False
    return True
