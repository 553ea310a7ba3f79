"""In which part of a model a mask lies."""
