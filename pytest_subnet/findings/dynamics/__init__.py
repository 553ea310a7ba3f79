"""How a run's update came about, checkpoint by checkpoint (arXiv 2505.11711, section 6)."""
