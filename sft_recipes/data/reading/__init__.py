"""From files to rows, and what the columns and turns of a row are.

- `row_files` finds files; `json_reader` and `tables` read their rows
- `columns` says which column is which, with `column_advice` where that is not clear and
  `refused_columns` where obeying one would change the meaning; `row_format` holds what the user says
- `column_values`, `conversations` with `turn_message` and `turn_keys`, and `calls` convert what
  stands in the columns
- `rejects` keeps the account of rows that are none

Nothing here knows of chat templates or tokens.
"""
