"""Self-contained HTML pages made from the plain files that audit and evaluation leave behind."""
