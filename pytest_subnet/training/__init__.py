"""Around training: what a block of code did to a model in memory."""
