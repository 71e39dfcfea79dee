"""What other tools train of a row: ids and labels, computed from their documented behaviour.

One module a tool, each with the version it was read from; `tests/foreign` holds them equal to the
tools themselves. Of a row that none of the rules covers, that is said; nothing is guessed.
"""
