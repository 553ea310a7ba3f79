"""Whether two updates moved the same entries (arXiv 2505.11711, Table 4)."""
