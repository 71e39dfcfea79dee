"""Supervised fine-tuning on Hugging Face TRL in which every step is checked.

Layers, imports point only downward (`tests/test_architecture.py` keeps it):

    cli > training > audit, evaluation, release > data, models, report
        > recipe, messages, run_folder, errors, statistics, similarity, response_patterns
"""

__version__ = "0.1.0"
