"""`python -m sft_recipes` is the console command."""

from sft_recipes.cli import main

main()
