"""What moved and what did not: frozen parts, trained parts, structure, ties, size of the change."""
