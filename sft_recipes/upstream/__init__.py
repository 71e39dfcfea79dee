"""The contract with upstream: every use of a private part of transformers, TRL or accelerate stands here.

Each says what is taken, why no public way does it, and where it was read; `tests/upstream` fails when a new version no
longer behaves so. Moving to a new TRL begins with these tests.
"""
