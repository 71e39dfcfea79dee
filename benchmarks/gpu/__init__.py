"""What one command shows on a GPU machine: is training right there, and how fast is it.

`python -m benchmarks.gpu --output DIR`; see `docs/gpu.md`. Modules, from the top down: `__main__`
(the command), `items` (what is run, in which order), one module for each group of items, `runs`
(models, rows and trainers they share), `flops` (operations counted), `shapes` (sizes of a real and
of a dry run), `children` (an item in a process of its own), `results` (what was measured, as JSON
and as a table).
"""
