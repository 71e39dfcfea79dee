"""What somebody trains who gives the same rows to TRL's SFTTrainer, with TRL's own defaults.

    python -m benchmarks.stock_trl RECIPE MODEL OUTPUT --max_steps 60 [--learning_rate 1e-3] [--seed 1] [--bf16]

The prompts are rendered as our recipe renders them, as text, and go in as prompt and completion: TRL then trains the
completion alone and puts EOS behind it. Learning rate, batch, schedule, LoRA and number of steps are the recipe's;
whatever else is TRL's default. Prints one line of JSON: seconds, last training loss, peak of resident memory.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer

from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.data.opening import open_labeller
from sft_recipes.recipe import Recipe
from sft_recipes.recipe_keys import load_recipe


def text_rows(recipe: Recipe) -> Dataset:
    """Prompt and completion of every training row as text, the prompt as the template writes it."""
    labeller = open_labeller(recipe)
    source = recipe.data.datasets[0]
    rows = []
    for example in iter_examples(source, recipe.data, RejectLog(recipe.data)):
        asked = labeller.for_template(example)
        prompt = labeller.renderer.render(asked.messages[:-1], add_generation_prompt=True)
        bos = labeller.renderer.tokenizer.bos_token or ""
        # TRL's tokenizer call writes BOS itself where the tokenizer does.
        writes_bos = (
            labeller.renderer.tokenizer("a")["input_ids"][0]
            == labeller.renderer.tokenizer.bos_token_id
        )
        if writes_bos:
            prompt = prompt.removeprefix(bos)
        rows.append({"prompt": prompt, "completion": str(asked.messages[-1]["content"])})
    return Dataset.from_list(rows)


def lora_of(recipe: Recipe) -> LoraConfig | None:
    """The recipe's LoRA, on all linear layers, or None for full fine-tuning."""
    if not recipe.model.get("use_peft"):
        return None
    return LoraConfig(
        r=recipe.model["lora_r"],
        lora_alpha=recipe.model["lora_alpha"],
        lora_dropout=recipe.model["lora_dropout"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def main() -> None:
    """Train, save model and tokenizer, print what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--max_steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--bf16", action="store_true", help="bfloat16 autocast, as ours chooses on such devices"
    )
    parser.add_argument("--learning_rate", type=float, help="instead of the recipe's")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, {"model_name_or_path": options.model})
    rows = text_rows(recipe)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    batch = recipe.training["per_device_train_batch_size"]
    config = SFTConfig(
        output_dir=str(options.output),
        max_steps=options.max_steps,
        seed=options.seed,
        learning_rate=options.learning_rate or recipe.training["learning_rate"],
        lr_scheduler_type=recipe.training["lr_scheduler_type"],
        warmup_steps=recipe.training["warmup_steps"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=(recipe.global_batch_size or batch) // batch,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=options.bf16,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_of(recipe),
    )
    # Standard output is for the one line of JSON.
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    last = losses[-10:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "loss": sum(last) / len(last), "peak_bytes": peak}))


if __name__ == "__main__":
    main()
