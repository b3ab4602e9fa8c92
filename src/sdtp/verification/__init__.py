"""That pruning means what it should: every way of generating, on one's own model, against hidden keys."""
