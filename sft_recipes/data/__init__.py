"""From rows to labels: rows become messages, messages texts, and texts ids with labels.

Data flows through the rooms in this order:

- files to rows to `Example`: `reading/`, then `formats` and `loading`
- examples to texts with trained spans: `admission`, `chat_templates` with `fitting`, `turns` and
  `turn_markers`, and `spans`
- texts to ids and labels: `encoding` and `labels`; `label_checks` and `template_checks` look at the
  result before a run
- all rows to disk: `prepare` with `workers`, `ledger` and `row_table`
- from there to the trainer: `prepared` with `prompt_groups`, `splits` and `mixture`

`opening` opens what a command needs. Nothing is imported here.
"""
