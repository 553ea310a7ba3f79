"""Whether a part of a model's weights is enough for what it does, and needed for it."""
