"""Whether the model that trains and the one that generates have the same weights."""
