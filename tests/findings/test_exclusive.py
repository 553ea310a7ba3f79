"""`assert_masks_exclusive`, `assert_updates_exclusive`, `assert_previous_masks_frozen`."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pytest_subnet import (
    PairMismatchError,
    SelectionError,
    UpdateMask,
    assert_masks_exclusive,
    assert_previous_masks_frozen,
    assert_updates_exclusive,
    open_trajectory,
)
from pytest_subnet.findings.exclusive.counts import count_pairs, count_shared


def masks_of(seed=0, count=4, density=0.3):
    """Random masks of two tensors; they overlap."""
    generator = np.random.default_rng(seed)
    return [
        UpdateMask.of(
            {"up": generator.random((9, 11)) < density, "down": generator.random(70) < density}
        )
        for _ in range(count)
    ]


def exclusive_of(masks):
    found, union = [], None
    for mask in masks:
        found.append(mask if union is None else mask - union)
        union = mask if union is None else union | mask
    return found


def run_of(masks, *, dtype=torch.float32, extra=None):
    """A start, and after each mask a checkpoint that moved just what is its own."""
    generator = torch.Generator().manual_seed(0)
    now = {
        "up": torch.randn(9, 11, generator=generator).to(dtype),
        "down": torch.randn(70, generator=generator).to(dtype),
        "norm": torch.randn(5, generator=generator).to(dtype),
        "steps": torch.zeros((), dtype=torch.int64),
    }
    run = [{name: each.clone() for name, each in now.items()}]
    for number, mask in enumerate(exclusive_of(masks)):
        for name in mask:
            now[name] += torch.from_numpy(mask[name]) * 1.0
        if extra is not None:
            extra(number, now)
        run.append({name: each.clone() for name, each in now.items()})
    return run


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(2, 6), st.sampled_from([0.02, 0.2, 0.5, 0.95]))
def test_counts_against_brute_force(seed, count, density):
    """Shared, union and what is in no mask before, by plain booleans."""
    masks = masks_of(seed, count, density)
    assume(all(masks))
    tensors, first = count_shared(masks)
    union, shared = (sum(getattr(each, what) for each in tensors) for what in ("union", "shared"))
    stacked = [np.concatenate([mask[name].ravel() for name in mask]) for mask in masks]
    together = np.stack(stacked).sum(0)
    assert (union, shared) == ((together > 0).sum(), (together > 1).sum())
    before = np.zeros(together.size, bool)
    for number, each in enumerate(stacked):
        assert first[number] == (each & ~before).sum()
        before |= each
    pairs = count_pairs(masks)
    for one, other in itertools.combinations(range(count), 2):
        assert pairs[one, other] == pairs[other, one] == (stacked[one] & stacked[other]).sum()


def test_exclusive_masks_hold(recorded):
    """The law that ExSSNeT stands on, whatever masks there were."""
    masks = exclusive_of(masks_of())
    result = assert_masks_exclusive({f"task {number}": mask for number, mask in enumerate(masks)})
    assert (result.overlap, result.shared) == (0.0, 0)
    assert result.counts == result.first_counts
    assert repr(result) == f"MasksExclusive(overlap=0, 0 of {result.union} in 4 masks shared)"
    assert recorded == [result]
    json.dumps(result.to_dict())
    assert "in no mask before" in result.table()
    assert dict(result.fingerprints)["base_1"] == ""


def test_masks_that_share(fails_with):
    """Verdict, the pairs that share most, and that it could not have been otherwise."""
    masks = {
        "a": UpdateMask.of({"w": [1, 1, 1, 0, 0], "v": [1, 0, 0, 0, 0]}),
        "b\x1b[31m": UpdateMask.of({"w": [1, 1, 0, 1, 0], "v": [0, 1, 0, 0, 0]}),
        "c": UpdateMask.of({"w": [0, 0, 1, 1, 0], "v": [0, 0, 1, 0, 0]}),
    }
    with fails_with(
        r"""
        masks share 57.14% of the entries they hold, allowed 10.00%
          masks      3 over 2 tensors, 10 entries, of which they use 7 (70.00%)
          shared     4 entries in two masks or more
          pairs      a and b\x1b[31m share 2
                     a and c share 1
                     b\x1b[31m and c share 1
          worst      w  4 shared  (bool[5])
          infeasible the densities sum to 1.6 in w, above 1 in 1 tensor: fewer or
                     sparser masks are needed to be exclusive there
          usually    whole masks of tasks, which overlap: only what is trained is exclusive
          to accept  max_overlap=0.58
        """
    ):
        assert_masks_exclusive(masks, max_overlap=0.1)
    assert assert_masks_exclusive(masks, max_overlap=0.58).shared == 4


def test_one_entry_too_many_is_found():
    """A single bit that two of many masks hold, in the last word."""
    masks = exclusive_of(masks_of())
    inside = np.argwhere(masks[3]["down"])[-1]
    entries = {name: masks[0][name].copy() for name in masks[0]}
    entries["down"][inside] = True
    with pytest.raises(AssertionError, match="mask 1 and mask 4 share 1\n"):
        assert_masks_exclusive([UpdateMask.of(entries), *masks[1:]])


@pytest.mark.parametrize(
    ("masks", "error", "text"),
    [
        (lambda a, b: [a], SelectionError, "1 mask can share nothing; give two or more"),
        (lambda a, b: {}, SelectionError, "0 masks can share nothing; give two or more"),
        (
            lambda a, b: {"a": a, "b": a},
            SelectionError,
            "a and b are the same mask, given twice",
        ),
        (
            lambda a, b: [a, a - a],
            SelectionError,
            "mask 2 is empty, and shares nothing with any mask; leave it out",
        ),
        (
            lambda a, b: a,
            TypeError,
            "masks is UpdateMask; a mapping or a sequence of UpdateMasks is needed",
        ),
        (
            lambda a, b: [a, "b"],
            TypeError,
            "mask 2 is str, not an UpdateMask; load it with .load(), or make one with "
            "UpdateMask.of",
        ),
        (
            lambda a, b: [a, UpdateMask.of({"up": [True]})],
            PairMismatchError,
            "the masks of given and of given differ in shape: up is [9, 11] in the first and [1] "
            "in the second; make both from the same model, with the same include, exclude and "
            "kinds",
        ),
    ],
)
def test_what_are_no_masks(masks, error, text):
    """Each by name, and none of them passes."""
    with pytest.raises(error) as caught:
        assert_masks_exclusive(masks(*masks_of(count=2)))
    assert str(caught.value) == text


def test_a_mask_that_was_loaded_twice(tmp_path):
    """Two objects, one file."""
    mask = masks_of(count=1)[0]
    mask.save(tmp_path / "mask.safetensors")
    twice = [UpdateMask.load(tmp_path / "mask.safetensors") for _ in range(2)]
    with pytest.raises(SelectionError, match="mask 1 and mask 2 are the same mask, given twice"):
        assert_masks_exclusive(twice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_keeps_to_its_masks(dtype, recorded):
    """Both hold; of whole masks and of what is exclusive in them alike."""
    masks = masks_of()
    run = open_trajectory(run_of(masks, dtype=dtype))
    result = assert_updates_exclusive(run, masks)
    exclusive = exclusive_of(masks)
    assert [step.exclusive for step in result.steps] == [each.count for each in exclusive]
    assert [step.moved for step in result.steps] == [each.count for each in exclusive]
    assert assert_updates_exclusive(run, exclusive).moved == result.moved
    frozen = assert_previous_masks_frozen(run, {f"{n}": mask for n, mask in enumerate(masks)})
    assert frozen.earlier == 0
    assert len(recorded) == 3
    json.dumps(result.to_dict())
    assert result.table().startswith("ExclusiveUpdates(4 tasks, moved=")
    assert set(result.fingerprints) == {"base", "tuned"}
    assert sum(each.moved for each in result.per_tensor) == result.moved


def test_a_run_in_files(save):
    """Checkpoints in directories give the same counts."""
    masks = masks_of(count=3)
    run = run_of(masks)
    for number, each in enumerate(run):
        save(each, f"checkpoint-{number}")
    in_files = assert_updates_exclusive(open_trajectory("."), masks)
    assert (
        in_files.steps[2][3:] == assert_updates_exclusive(open_trajectory(run), masks).steps[2][3:]
    )


def test_a_permutation_is_seen(fails_with):
    """Two old entries that change places: their sum, norm and histogram are what they were."""
    masks = masks_of(count=2)
    (one, other) = np.argwhere(masks[0]["down"])[:2, 0]

    def swap(number, now):
        if number == 1:
            now["down"][[one, other]] = now["down"][[other, one]]

    run = open_trajectory(run_of(masks, extra=swap))
    with pytest.raises(AssertionError, match=r"^2 entries (moved outside|of earlier)"):
        assert_updates_exclusive(run, masks)
    moved = run_of(masks, extra=swap)[2]["down"] != run_of(masks)[2]["down"]
    assert int(moved.sum()) == 2
    counts = exclusive_of(masks)[1].count + 2
    with fails_with(
        f"""
        2 entries of earlier masks moved: those tasks compute otherwise
          run        dict of tensors #1 … dict of tensors #3, 3 checkpoints   (same bits, f32+i64, 4/4 tensors, 175 entries)
          steps      2 of {counts} moved by mask 2 (dict of tensors #2 -> dict of tensors #3)
          worst      down  2 moved  (f32[70])
          usually    all of a mask was trained (SSNeT) instead of what no earlier mask holds,
                     weight decay or momentum on masked gradients, or masks in another order
        """  # noqa: E501
    ):
        assert_previous_masks_frozen(run, masks)


def test_what_no_mask_covers_may_not_move(fails_with):
    """A norm and a buffer, which all tasks share; and a free entry."""
    masks = masks_of(count=2, density=0.1)
    free = np.argwhere(~(masks[0] | masks[1])["up"])[0]

    def decay(number, now):
        if number == 0:
            now["norm"] *= 0.5
            now["steps"] += 1
            now["up"][tuple(free)] += 1

    run = open_trajectory(run_of(masks, extra=decay))
    moved = exclusive_of(masks)[0].count + 7
    with fails_with(
        f"""
        7 entries moved outside the mask of the task that was trained
          run        dict of tensors #1 … dict of tensors #3, 3 checkpoints   (same bits, f32+i64, 4/4 tensors, 175 entries)
          steps      7 of {moved} moved by mask 1 (dict of tensors #1 -> dict of tensors #2)
          worst      norm   5 outside  (f32[5])
                     up     1 outside  (f32[9,11])
                     steps  1 outside  (i64[])
          usually    weight decay or momentum on masked gradients, a bias or norm that was
                     trained too, the statistics of a batch norm, or masks in another order
        """  # noqa: E501
    ):
        assert_updates_exclusive(run, masks)
    assert assert_previous_masks_frozen(run, masks).outside == 7
    left = open_trajectory(run_of(masks, extra=decay))
    with pytest.raises(AssertionError, match=r"^1 entry moved outside"):
        assert_updates_exclusive(left, masks, exclude=["norm", "steps"])


def test_the_whole_mask_trained_is_not_exclusive():
    """SSNeT: entries of mask 2 that mask 1 holds too lie within mask 2, and are another's."""
    masks = masks_of(count=2)
    shared = masks[0] & masks[1]

    def train_all(number, now):
        if number == 1:
            for name in shared:
                now[name] += torch.from_numpy(shared[name]) * 1.0

    run = open_trajectory(run_of(masks, extra=train_all))
    with pytest.raises(AssertionError, match=f"^{shared.count} entries of earlier masks moved"):
        assert_updates_exclusive(run, masks)
    with pytest.raises(AssertionError, match=f"^{shared.count} entries of earlier masks moved"):
        assert_previous_masks_frozen(run, masks)


def test_the_order_of_masks_matters():
    """The run of the masks in one order is not that of the other."""
    masks = masks_of(count=2)
    run = open_trajectory(run_of(masks))
    with pytest.raises(AssertionError, match="moved outside the mask"):
        assert_updates_exclusive(run, masks[::-1])


def test_zeros_that_change_sign_have_moved():
    """Other bits, same value: what the old task computes can differ."""
    mask = UpdateMask.of({"w": [True, False]})
    other = UpdateMask.of({"w": [False, True]})
    run = [{"w": torch.tensor(each)} for each in ([0.0, 0.0], [1.0, -0.0], [1.0, -1.0])]
    with pytest.raises(AssertionError, match=r"^1 entry moved outside"):
        assert_updates_exclusive(open_trajectory(run), [mask, other])


def test_steps_that_moved_nothing(fails_with):
    """A run that was saved again would keep to any masks."""
    masks = masks_of(count=2)
    start, one, _ = run_of(masks)
    run = open_trajectory([start, one, {name: each.clone() for name, each in one.items()}])
    with fails_with(
        """
        1 step of 2 moved nothing: it is no training
          run        dict of tensors #1 … dict of tensors #3, 3 checkpoints   (same bits, f32+i64, 4/4 tensors, 175 entries)
          idle       dict of tensors #2 -> dict of tensors #3
          usually    a checkpoint was saved again, or only masks are learnt (SupSup)
          to accept  allow_identical=True
        """  # noqa: E501
    ):
        assert_updates_exclusive(run, masks)
    assert assert_updates_exclusive(run, masks, allow_identical=True).steps[1].moved == 0
    with pytest.raises(AssertionError, match=r"^1 step of 2 moved nothing"):  # and froze nothing
        assert_previous_masks_frozen(run, masks)
    assert assert_previous_masks_frozen(run, masks, allow_identical=True).moved
    same = open_trajectory([{name: each.clone() for name, each in start.items()} for _ in range(3)])
    with pytest.raises(AssertionError, match=r"^2 steps of 2 moved nothing"):
        assert_previous_masks_frozen(same, masks)
    assert not assert_previous_masks_frozen(same, masks, allow_identical=True).moved


def test_a_step_that_has_nothing_left_may_move_nothing():
    """When the capacity is used up; a mask of a subset of the first."""
    first = masks_of(count=1, density=0.5)[0]
    second = first & masks_of(seed=1, count=1)[0]
    start, one, two = run_of([first, second])
    assert assert_updates_exclusive(open_trajectory([start, one, two]), [first, second]).moved


def test_snapshots_of_masks(fails_with):
    """An old mask that changed later, as averaging scores in place does."""
    masks = masks_of(count=3)
    run = open_trajectory(run_of(masks))
    same = [masks[:1], masks[:2], masks]
    assert assert_previous_masks_frozen(run, same).changed_masks == ()
    by_name = [{f"task {n}": mask for n, mask in enumerate(each)} for each in same]
    assert not assert_previous_masks_frozen(run, by_name).changed_masks
    entries = {name: masks[0][name].copy() for name in masks[0]}
    entries["up"][0, :2] ^= True
    entries["down"][-1] ^= True
    by_name[2]["task 0"] = UpdateMask.of(entries)
    with fails_with(
        """
        a previous mask changed: task 0 in 3 entries after task 2
          run        dict of tensors #1 … dict of tensors #4, 4 checkpoints   (same bits, f32+i64, 4/4 tensors, 175 entries)
          usually    scores of an old task were averaged or trained in place; copy them first
        """  # noqa: E501
    ):
        assert_previous_masks_frozen(run, by_name)
    with pytest.raises(ValueError, match=r"^snapshot 2 holds 1 mask .mask 1 last.: after step 2"):
        assert_previous_masks_frozen(run, [masks[:1], masks[:1], masks])


def test_misuse():
    """Each by name."""
    masks = masks_of(count=2)
    run = open_trajectory(run_of(masks))
    with pytest.raises(ValueError, match=r"^1 mask for 2 steps of dict .*, 3 checkpoints: one"):
        assert_updates_exclusive(run, masks[:1])
    with pytest.raises(SelectionError, match=r"^1 task has no previous mask; give two or more"):
        assert_previous_masks_frozen(run, masks[:1])
    with pytest.raises(SelectionError, match=r"^all masks are empty: no step may move anything"):
        assert_updates_exclusive(run, [masks[0] - masks[0], masks[1] - masks[1]])
    with pytest.raises(SelectionError, match=r"^nothing is selected that the masks name"):
        assert_updates_exclusive(run, masks, include="norm")
    with pytest.raises(TypeError, match=r"^a Trajectory is needed, got list"):
        assert_updates_exclusive([{}], masks)
    other = [UpdateMask.of({"upp": mask["up"]}) for mask in masks]
    with pytest.raises(PairMismatchError, match=r"^the masks name upp, which .*did you mean up\?"):
        assert_updates_exclusive(run, other)
    other = [UpdateMask.of({"up": mask["up"].T}) for mask in masks]
    with pytest.raises(PairMismatchError, match=r"^the masks have shape \[11, 9\] for up, the run"):
        assert_updates_exclusive(run, other)
    with pytest.raises(ValueError, match="max_overlap=2 is not a fraction in"):
        assert_masks_exclusive(masks, max_overlap=2)


def test_reworded():
    """The whole text is handed over."""
    masks = masks_of(count=2)
    with pytest.raises(AssertionError, match=r"^our run: masks share"):
        assert_masks_exclusive(masks, message=lambda text: f"our run: {text}")
