"""From a finished run to what others can use: an exported folder, a card, a Hub repository."""
