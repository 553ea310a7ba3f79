"""Whether a run forgot what it could do, and whether that came back (arXiv 2509.12235)."""
