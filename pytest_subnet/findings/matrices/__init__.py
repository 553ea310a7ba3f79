"""What findings about matrices share: which are measured, by which engine, and their spectra."""
