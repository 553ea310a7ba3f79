"""How far leading singular directions turned (arXiv 2509.12235, section 4; 2511.08567)."""
