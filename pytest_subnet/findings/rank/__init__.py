"""In how many directions each matrix moved (arXiv 2505.11711, Table 2)."""
