"""What is wrong with a run that any tool made, read from its files."""
