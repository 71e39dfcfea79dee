"""From files to rows, and what the columns and turns of a row are.

- `row_files` finds files; `json_reader` and `tables` read their rows
- `known_formats` is the table of formats, `columns` says which column is which and which format
  follows, with `column_advice` where that is not clear and `refused_columns` where passing one over
  would change the meaning; `row_format` holds what the user says
- `row_fields`, `conversations` with `turn_message` and `turn_keys`, `calls` and `column_values`
  convert what stands in the columns
- `rejects` keeps the account of rows that are none

Nothing here knows of chat templates or tokens.
"""
