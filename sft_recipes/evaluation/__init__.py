"""Generates answers, scores them and compares two models on the same prompts."""
