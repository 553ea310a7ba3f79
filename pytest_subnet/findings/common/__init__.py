"""What findings share: bounds, chance, fingerprints, results, words."""
