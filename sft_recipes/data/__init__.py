"""From rows to labels: read files strictly, turn every row into messages, render them, and mark what is trained.

Data flows through the modules in this order: `json_reader` (bytes to rows), `formats` (row to `Example`), `loading`
(files, folders and Hub sets), then templates, labels and preparation. Nothing is imported here.
"""
