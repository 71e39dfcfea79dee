"""Training: `train.py` is the page to read; `trainer.py` is the hand-off to TRL."""
