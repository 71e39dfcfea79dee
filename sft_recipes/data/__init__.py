"""From rows to labels: read files strictly, turn every row into messages, render them, and mark what is trained.

Data flows through the rooms in this order: `reading/` (files to rows), `formats` and `loading` (rows to `Example`),
`chat_templates` with `fitting`, `turns` and `spans` (examples to texts with trained spans), `encoding` and `labels`
(texts to ids and labels), `prepare` with `workers` (all rows to disk) and `prepared` (from there to the trainer).
`opening` opens what a command needs. Nothing is imported here.
"""
