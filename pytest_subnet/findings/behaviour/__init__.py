"""How differently two models predict the next token, whatever became of their weights."""
