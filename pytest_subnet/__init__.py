"""Assertions on what fine-tuning did to a model's weights.

The names below are imported when they are first used, so that a test suite that has this plugin
installed and does not use it pays nothing for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_subnet.checkpoints.adapters.opening import open_adapter as open_adapter
    from pytest_subnet.checkpoints.base import Checkpoint as Checkpoint
    from pytest_subnet.checkpoints.opening import open_checkpoint as open_checkpoint
    from pytest_subnet.checkpoints.quantised.opening import dequantised as dequantised
    from pytest_subnet.errors import CheckpointError as CheckpointError
    from pytest_subnet.errors import PairMismatchError as PairMismatchError
    from pytest_subnet.errors import SelectionError as SelectionError
    from pytest_subnet.errors import SubnetError as SubnetError
    from pytest_subnet.errors import VacuousBoundWarning as VacuousBoundWarning
    from pytest_subnet.findings.behaviour.finding import (
        assert_behaviour_close as assert_behaviour_close,
    )
    from pytest_subnet.findings.behaviour.finding import behaviour_shift as behaviour_shift
    from pytest_subnet.findings.behaviour.policy import assert_near_policy as assert_near_policy
    from pytest_subnet.findings.behaviour.policy import near_policy as near_policy
    from pytest_subnet.findings.concentration.density import (
        assert_mask_density as assert_mask_density,
    )
    from pytest_subnet.findings.concentration.density import (
        assert_subnetwork_size as assert_subnetwork_size,
    )
    from pytest_subnet.findings.concentration.finding import (
        assert_mask_concentration as assert_mask_concentration,
    )
    from pytest_subnet.findings.concentration.finding import (
        mask_concentration as mask_concentration,
    )
    from pytest_subnet.findings.displacement.finding import (
        assert_displacement_rank as assert_displacement_rank,
    )
    from pytest_subnet.findings.displacement.finding import displacement as displacement
    from pytest_subnet.findings.displacement.finding import displacement_rank as displacement_rank
    from pytest_subnet.findings.displacement.operators import (
        DisplacementOperator as DisplacementOperator,
    )
    from pytest_subnet.findings.dynamics.finding import assert_step_sparsity as assert_step_sparsity
    from pytest_subnet.findings.dynamics.finding import (
        assert_update_dynamics as assert_update_dynamics,
    )
    from pytest_subnet.findings.dynamics.finding import update_dynamics as update_dynamics
    from pytest_subnet.findings.exclusive.finding import (
        assert_masks_exclusive as assert_masks_exclusive,
    )
    from pytest_subnet.findings.exclusive.finding import (
        assert_previous_masks_frozen as assert_previous_masks_frozen,
    )
    from pytest_subnet.findings.exclusive.finding import (
        assert_updates_exclusive as assert_updates_exclusive,
    )
    from pytest_subnet.findings.forgetting.finding import (
        assert_no_forgetting as assert_no_forgetting,
    )
    from pytest_subnet.findings.forgetting.finding import assert_ood_restored as assert_ood_restored
    from pytest_subnet.findings.forgetting.finding import ood_forgetting as ood_forgetting
    from pytest_subnet.findings.forgetting.finding import ood_restored as ood_restored
    from pytest_subnet.findings.geometry.consensus import consensus_jaccard as consensus_jaccard
    from pytest_subnet.findings.geometry.cosine import task_vector_cosine as task_vector_cosine
    from pytest_subnet.findings.geometry.finding import assert_off_principal as assert_off_principal
    from pytest_subnet.findings.geometry.finding import update_geometry as update_geometry
    from pytest_subnet.findings.interface.finding import (
        assert_same_interface as assert_same_interface,
    )
    from pytest_subnet.findings.interface.finding import same_interface as same_interface
    from pytest_subnet.findings.movement.finding import assert_finite as assert_finite
    from pytest_subnet.findings.movement.finding import assert_frozen as assert_frozen
    from pytest_subnet.findings.movement.finding import assert_max_change as assert_max_change
    from pytest_subnet.findings.movement.finding import assert_updated as assert_updated
    from pytest_subnet.findings.movement.finding import update_movement as update_movement
    from pytest_subnet.findings.overlap.finding import assert_mask_overlap as assert_mask_overlap
    from pytest_subnet.findings.overlap.finding import mask_overlap as mask_overlap
    from pytest_subnet.findings.precision import visible_share as visible_share
    from pytest_subnet.findings.rank.finding import assert_update_rank as assert_update_rank
    from pytest_subnet.findings.rank.finding import update_rank as update_rank
    from pytest_subnet.findings.recovery.finding import (
        assert_subnetwork_recovers as assert_subnetwork_recovers,
    )
    from pytest_subnet.findings.recovery.finding import subnetwork_recovery as subnetwork_recovery
    from pytest_subnet.findings.rotation.finding import (
        assert_singular_vector_rotation as assert_singular_vector_rotation,
    )
    from pytest_subnet.findings.rotation.finding import singular_rotation as singular_rotation
    from pytest_subnet.findings.sparsity.finding import assert_even_sparsity as assert_even_sparsity
    from pytest_subnet.findings.sparsity.finding import (
        assert_update_sparsity as assert_update_sparsity,
    )
    from pytest_subnet.findings.sparsity.finding import update_sparsity as update_sparsity
    from pytest_subnet.findings.spectrum.finding import (
        assert_singular_values_stable as assert_singular_values_stable,
    )
    from pytest_subnet.findings.spectrum.finding import singular_shift as singular_shift
    from pytest_subnet.findings.structure import assert_same_structure as assert_same_structure
    from pytest_subnet.findings.structure import assert_tied as assert_tied
    from pytest_subnet.findings.subnetworks.finding import (
        assert_subnetwork_necessary as assert_subnetwork_necessary,
    )
    from pytest_subnet.findings.subnetworks.finding import (
        assert_subnetwork_sufficient as assert_subnetwork_sufficient,
    )
    from pytest_subnet.findings.subnetworks.finding import (
        subnetwork_necessity as subnetwork_necessity,
    )
    from pytest_subnet.findings.subnetworks.finding import (
        subnetwork_sufficiency as subnetwork_sufficiency,
    )
    from pytest_subnet.findings.synced.finding import assert_synced as assert_synced
    from pytest_subnet.masks.builders import magnitude_mask as magnitude_mask
    from pytest_subnet.masks.builders import principal_mask as principal_mask
    from pytest_subnet.masks.builders import random_mask_like as random_mask_like
    from pytest_subnet.masks.building import update_mask as update_mask
    from pytest_subnet.masks.update_mask import UpdateMask as UpdateMask
    from pytest_subnet.pairs.model_pair import ModelPair as ModelPair
    from pytest_subnet.pairs.opening import open_pair as open_pair
    from pytest_subnet.published.selecting import published_numbers as published_numbers
    from pytest_subnet.published.selecting import published_sparsities as published_sparsities
    from pytest_subnet.training.density_callback import DensityCallback as DensityCallback
    from pytest_subnet.training.finding import find_subnetwork as find_subnetwork
    from pytest_subnet.training.inside import train_inside as train_inside
    from pytest_subnet.training.recorder import record_update as record_update
    from pytest_subnet.training.restoring import (
        restore_singular_vectors as restore_singular_vectors,
    )
    from pytest_subnet.training.structured import ToeplitzLikeLinear as ToeplitzLikeLinear
    from pytest_subnet.training.structured import fit_displacement as fit_displacement
    from pytest_subnet.training.subnetwork_callback import SubnetworkCallback as SubnetworkCallback
    from pytest_subnet.training.supermasks import Supermasks as Supermasks
    from pytest_subnet.trajectories.opening import open_trajectory as open_trajectory
    from pytest_subnet.trajectories.trajectory import Trajectory as Trajectory

_WHERE = {
    "checkpoints.adapters.opening": ("open_adapter",),
    "checkpoints.base": ("Checkpoint",),
    "checkpoints.opening": ("open_checkpoint",),
    "checkpoints.quantised.opening": ("dequantised",),
    "errors": (
        "CheckpointError",
        "PairMismatchError",
        "SelectionError",
        "SubnetError",
        "VacuousBoundWarning",
    ),
    "findings.behaviour.finding": ("assert_behaviour_close", "behaviour_shift"),
    "findings.behaviour.policy": ("assert_near_policy", "near_policy"),
    "findings.concentration.finding": ("assert_mask_concentration", "mask_concentration"),
    "findings.concentration.density": ("assert_mask_density", "assert_subnetwork_size"),
    "findings.displacement.finding": (
        "assert_displacement_rank",
        "displacement",
        "displacement_rank",
    ),
    "findings.displacement.operators": ("DisplacementOperator",),
    "findings.dynamics.finding": (
        "assert_step_sparsity",
        "assert_update_dynamics",
        "update_dynamics",
    ),
    "findings.exclusive.finding": (
        "assert_masks_exclusive",
        "assert_previous_masks_frozen",
        "assert_updates_exclusive",
    ),
    "findings.forgetting.finding": (
        "assert_no_forgetting",
        "assert_ood_restored",
        "ood_forgetting",
        "ood_restored",
    ),
    "findings.geometry.finding": ("assert_off_principal", "update_geometry"),
    "findings.geometry.consensus": ("consensus_jaccard",),
    "findings.geometry.cosine": ("task_vector_cosine",),
    "findings.interface.finding": ("assert_same_interface", "same_interface"),
    "findings.movement.finding": (
        "assert_finite",
        "assert_frozen",
        "assert_max_change",
        "assert_updated",
        "update_movement",
    ),
    "findings.overlap.finding": ("assert_mask_overlap", "mask_overlap"),
    "findings.precision": ("visible_share",),
    "findings.rank.finding": ("assert_update_rank", "update_rank"),
    "findings.recovery.finding": ("assert_subnetwork_recovers", "subnetwork_recovery"),
    "findings.rotation.finding": ("assert_singular_vector_rotation", "singular_rotation"),
    "findings.sparsity.finding": (
        "assert_even_sparsity",
        "assert_update_sparsity",
        "update_sparsity",
    ),
    "findings.spectrum.finding": ("assert_singular_values_stable", "singular_shift"),
    "findings.structure": ("assert_same_structure", "assert_tied"),
    "findings.subnetworks.finding": (
        "assert_subnetwork_necessary",
        "assert_subnetwork_sufficient",
        "subnetwork_necessity",
        "subnetwork_sufficiency",
    ),
    "findings.synced.finding": ("assert_synced",),
    "masks.builders": ("magnitude_mask", "principal_mask", "random_mask_like"),
    "masks.building": ("update_mask",),
    "masks.update_mask": ("UpdateMask",),
    "pairs.model_pair": ("ModelPair",),
    "pairs.opening": ("open_pair",),
    "published.selecting": ("published_numbers", "published_sparsities"),
    "training.density_callback": ("DensityCallback",),
    "training.finding": ("find_subnetwork",),
    "training.inside": ("train_inside",),
    "training.recorder": ("record_update",),
    "training.restoring": ("restore_singular_vectors",),
    "training.structured": ("ToeplitzLikeLinear", "fit_displacement"),
    "training.subnetwork_callback": ("SubnetworkCallback",),
    "training.supermasks": ("Supermasks",),
    "trajectories.opening": ("open_trajectory",),
    "trajectories.trajectory": ("Trajectory",),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}
_awaited: dict[str, Callable[[Any], object]] = {}

__version__ = "0.1.0"
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> object:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = value
    if name in _awaited:
        _awaited.pop(name)(value)
    return value


def when_used(name: str, call: Callable[[Any], object]) -> None:
    """Call `call` with what is public as `name`, now or as soon as it is first taken from here."""
    if name in globals():
        call(globals()[name])
    else:
        _awaited[name] = call


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
