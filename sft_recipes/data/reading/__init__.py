"""From files to rows: which files stand behind a source, their rows, and what the columns and turns of a row are.

`row_files` finds files; `json_reader` and `tables` read their rows; `columns` says which column is which, with
`column_advice` where that is not clear and `refused_columns` where obeying one would change the meaning;
`column_values`, `conversations` and `calls` convert what stands in them; `rejects` keeps the account of rows that are
none. Nothing here knows of chat templates or tokens.
"""
