"""Hypothesis strategies for the weights, updates, masks and runs of fine-tuned models.

    from pytest_subnet.strategies import model_pairs

None needs to be imported for `st.from_type(ModelPair)`, nor for `UpdateMask` and `Trajectory`.
"""

from pytest_subnet.strategies.checkpoints import checkpoints
from pytest_subnet.strategies.finetunes import finetunes
from pytest_subnet.strategies.model_pairs import model_pairs
from pytest_subnet.strategies.saved_checkpoints import SavedCheckpoint
from pytest_subnet.strategies.state_dicts import state_dicts
from pytest_subnet.strategies.tensors import tensors
from pytest_subnet.strategies.training_runs import Finetune
from pytest_subnet.strategies.trajectories import trajectories
from pytest_subnet.strategies.update_masks import update_masks
from pytest_subnet.strategies.updates import Update, updates

__all__ = [
    "Finetune",
    "SavedCheckpoint",
    "Update",
    "checkpoints",
    "finetunes",
    "model_pairs",
    "state_dicts",
    "tensors",
    "trajectories",
    "update_masks",
    "updates",
]
