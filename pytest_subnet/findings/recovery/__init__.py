"""Whether training inside a mask arrives where full training did (arXiv 2505.11711, section 4)."""
