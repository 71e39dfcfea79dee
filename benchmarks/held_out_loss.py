"""The loss of a finished model on a recipe's held-out split, under our labels, whoever trained it.

    python -m benchmarks.held_out_loss RECIPE MODEL TRAINED_FOLDER

RECIPE and MODEL say which rows and which template; TRAINED_FOLDER holds a model or an adapter. Prints one line of JSON:
the mean loss of a trained token in float32, and how many there are.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from sft_recipes.data.loading import read_held_out
from sft_recipes.data.opening import open_labeller
from sft_recipes.models import load_for_inference
from sft_recipes.recipe_keys import load_recipe


def main() -> None:
    """Add up the loss of every row, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("model")
    parser.add_argument("trained")
    options = parser.parse_args()
    keys = {
        "model_name_or_path": options.model,
        "dataset_train_split": "validation",
        "dataset_test_split": None,
    }
    recipe = load_recipe(options.recipe, keys)
    labeller = open_labeller(recipe)
    examples = [
        labeller.for_template(example)
        for example in read_held_out(recipe.data.datasets, recipe.data)
    ]
    model = load_for_inference(options.trained, "float32").model
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in labeller.label(examples).rows:
            ids = torch.tensor(row.input_ids, device=model.device)
            logits = model(ids[None]).logits[0]
            for start, end in row.spans:
                total += cross_entropy(
                    logits[start - 1 : end - 1], ids[start:end], reduction="sum"
                ).item()
                tokens += end - start
    print(json.dumps({"loss": total / tokens, "tokens": tokens}))


if __name__ == "__main__":
    main()
