"""From a finished run to something others can use: an exported folder, a model card, a repository on the Hub."""
