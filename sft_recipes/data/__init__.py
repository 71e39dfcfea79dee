"""From rows to labels: read files strictly, turn every row into messages, render them, and mark what is trained.

Data flows through the modules in this order: `row_files` (names to files), `json_reader` and `tables` (bytes to rows),
`columns` and `refused_columns` (which column is what), `conversations` and `formats` (row to `Example`), `loading` (a
data set to examples), then templates, labels and preparation. Nothing is imported here.
"""
