"""Configs of other tools: what each of their keys means here, and what is wrong with them."""
