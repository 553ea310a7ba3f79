"""How much of the model did not move (arXiv 2505.11711, section 2.2 and Table 1)."""
