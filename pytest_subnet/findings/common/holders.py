"""What people pass where weights are wanted, and which part of it is meant."""

from __future__ import annotations


def model_inside(given: object, called: str) -> str:
    """How the model that a trainer (or any other object) holds is passed; "" where it holds none.

    Args:
        given: what was passed.
        called: what it is called in the text.

    >>> class Trainer:
    ...     def __init__(self, model):
    ...         self.model = model
    >>> model_inside(Trainer(torch.nn.Linear(2, 2)), "trainer")
    '; pass the model that it holds: trainer.model'
    """
    held = getattr(given, "__dict__", {}).get("model")  # not getattr, which may run anything
    if isinstance(given, type) or not callable(getattr(held, "state_dict", None)):
        return ""
    return f"; pass the model that it holds: {called}.model"
