"""How far the singular values moved (arXiv 2509.12235; the spectrum shift of 2511.08567)."""
