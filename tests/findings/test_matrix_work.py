"""What is measured of matrices is measured once: for other findings, processes and runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import SelectionError, open_pair, progress, update_rank
from pytest_subnet.findings.displacement.finding import displacement_rank
from pytest_subnet.findings.displacement.operators import Diagonal, DisplacementOperator, Shift
from pytest_subnet.findings.matrices import base_cache, spectra, subspaces
from pytest_subnet.findings.matrices import engines as matrix_engines
from pytest_subnet.findings.matrices import work as matrix_work
from pytest_subnet.findings.matrices.rows import KeptRows
from pytest_subnet.findings.matrices.updates import Matrix
from pytest_subnet.findings.rank.result import RankOfUpdate
from pytest_subnet.findings.rotation.finding import singular_rotation
from pytest_subnet.findings.rotation.result import SingularRotation
from pytest_subnet.findings.spectrum.finding import singular_shift
from pytest_subnet.findings.spectrum.result import SingularShift
from pytest_subnet.scan import cache
from pytest_subnet.scan.gathering import ledger, remember_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_subnet import ModelPair

Q, K, EXPERTS = "layers.0.q_proj.weight", "layers.1.q_proj.weight", "layers.0.experts.weight"

MEASURES: dict[str, Callable[[ModelPair], Any]] = {
    "shift": singular_shift,
    "rotation": lambda pair: singular_rotation(pair, k=2),
    "displacement": displacement_rank,
    "rank": lambda pair: update_rank(pair, effective=True),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(root: Path, side: str, *, seed: int = 0, config: dict[str, object] | None = None) -> None:
    """Two matrices and a stack of three; the tuned side moved a little."""
    shapes = {Q: (14, 10), K: (10, 14), EXPERTS: (3, 8, 9)}
    tensors = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    if seed:
        tensors = {
            name: each + 0.1 * random(*each.shape, seed=seed) for name, each in tensors.items()
        }
    (root / side).mkdir(exist_ok=True)
    save_file(tensors, root / side / "model.safetensors")
    if config is not None:
        (root / side / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """`base` and `tuned`, dated long enough ago to be kept."""
    write(tmp_path, "base")
    write(tmp_path, "tuned", seed=9)
    time.sleep(cache._TICK_NS / 1e9 + 0.02)
    return tmp_path


@pytest.fixture
def opened(files: Path) -> Callable[..., ModelPair]:
    """Opens the pair as another process would, which has nothing in its memory."""

    def open_again(tuned: str = "tuned", **options: Any) -> ModelPair:
        base_cache._kept.clear()
        pair = open_pair(files / "base", files / tuned, **options)
        remember_in(pair, files / "kept")
        return pair

    return open_again


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Matrix]]:
    """The matrices that were measured, in order."""
    seen: list[Matrix] = []
    original = matrix_engines._Measuring._measure

    def measure(self: Any, batch: Any) -> Any:
        seen.extend(batch)
        return original(self, batch)

    monkeypatch.setattr(matrix_engines._Measuring, "_measure", measure)
    return seen


@pytest.mark.parametrize("finding", MEASURES)
def test_what_one_run_measured_the_next_does_not(
    finding: str, opened: Callable[..., ModelPair], measured: list[Matrix]
) -> None:
    measure = MEASURES[finding]
    first = opened()
    expected = measure(first)
    count = len(measured)
    assert count >= 3
    second = opened()
    assert measure(second) == expected
    assert len(measured) == count
    assert ledger(second).taken >= len({each.row for each in measured})
    assert ledger(second).read == 0


def test_another_process_decomposes_nothing(files: Path, opened: Callable[..., ModelPair]) -> None:
    here = [singular_shift(opened()), singular_rotation(opened(), k=2, null=None)]
    script = f"""
import sys
sys.path.insert(0, {str(files)!r})
from pytest_subnet import open_pair
from pytest_subnet.findings.matrices import engines as matrix_engines
from pytest_subnet.findings.rotation.finding import singular_rotation
from pytest_subnet.findings.spectrum.finding import singular_shift
from pytest_subnet.scan.gathering import remember_in
pair = open_pair("base", "tuned")
remember_in(pair, __import__("pathlib").Path("kept"))
matrix_engines._Measuring._measure = None
print([each.per_tensor for each in (singular_shift(pair), singular_rotation(pair, k=2, null=None))])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=files, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str([each.per_tensor for each in here])


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_of_a_file_that_changed_all_is_measured_again(
    side: str, files: Path, opened: Callable[..., ModelPair], measured: list[Matrix]
) -> None:
    before = displacement_rank(opened(), of="update")
    count = len(measured)
    write(files, side, seed=11)
    time.sleep(cache._TICK_NS / 1e9 + 0.02)
    after = displacement_rank(opened(), of="update")
    assert len(measured) == 2 * count
    assert [each.leading for each in after.per_tensor] != [
        each.leading for each in before.per_tensor
    ]


def test_the_config_tells_how_a_fused_matrix_is_made_up(
    files: Path, opened: Callable[..., ModelPair], measured: list[Matrix]
) -> None:
    singular_rotation(opened(), k=1, null=None)
    count = len(measured)
    config = {"num_attention_heads": 2}
    (files / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    singular_rotation(opened(), k=1, null=None)
    assert len(measured) == 2 * count


def test_other_work_is_other_work(opened: Callable[..., ModelPair], measured: list[Matrix]) -> None:
    singular_shift(opened(), include=Q)
    singular_shift(opened(), include=Q, relative_to="top")
    assert [each.row for each in measured] == [measured[0].row] * 2
    singular_shift(opened(), include=[Q, K])
    assert len(measured) == 3


def test_rows_that_were_asked_for_less_do_not_answer_for_more(
    opened: Callable[..., ModelPair], measured: list[Matrix]
) -> None:
    update_rank(opened(), include=Q)
    update_rank(opened(), include=Q, effective=True)
    assert len(measured) == 2
    assert update_rank(opened(), include=Q).per_tensor[0].effective_rank is None
    assert len(measured) == 2


def test_what_was_measured_before_an_error_is_kept(
    files: Path, opened: Callable[..., ModelPair], measured: list[Matrix]
) -> None:
    tensors = {Q: random(14, 10), K: torch.full((14, 10), float("nan"))}
    for side in ("base", "tuned"):
        save_file(tensors, files / side / "model.safetensors")
    time.sleep(cache._TICK_NS / 1e9 + 0.02)
    with pytest.raises(SelectionError, match="holds NaN or Inf"):
        displacement_rank(opened())
    assert len(measured) == 2
    displacement_rank(opened(), include=Q)
    assert len(measured) == 2


def test_nothing_is_kept_of_weights_in_memory_nor_without_a_directory(
    files: Path, measured: list[Matrix]
) -> None:
    base, tuned = {Q: random(14, 10)}, {Q: random(14, 10, seed=1)}
    for _ in range(2):
        pair = open_pair(base, tuned)
        remember_in(pair, files / "kept")
        displacement_rank(pair)
        displacement_rank(open_pair(files / "base", files / "tuned"), include=Q)
    assert len(measured) == 4
    assert not (files / "kept").exists()


def test_work_whose_key_is_not_made_of_plain_values_is_not_kept(
    opened: Callable[..., ModelPair], measured: list[Matrix]
) -> None:
    """What another process calls by the same address is another thing."""

    class Doubling(Diagonal):
        pass

    nodes = tuple(float(i) for i in range(14))
    for left, count in ((Diagonal(nodes), 1), (Doubling(nodes), 3)):
        operator = DisplacementOperator("mine", left, Shift(0))
        for _ in range(2):
            displacement_rank(opened(), operator=operator, include=Q)
        assert len(measured) == count


ROW = [Q, [14, 10], "float32", 0, "q_proj", 0.5, 3, 0.25, "gram"]


@pytest.mark.parametrize(
    "entry",
    [
        {"of": "spectrum.result:SingularShift", "row": ROW[:-1]},
        {"of": "spectrum.result:SingularShift", "row": [*ROW[:-1], None]},
        {"of": "spectrum.result:SingularShift", "row": ["another", *ROW[1:]]},
        {"of": "spectrum.result:SingularShift", "row": [Q, [14], *ROW[2:]]},
        {"of": "spectrum.result:SingularShift", "row": [*ROW[:5], True, *ROW[6:]]},
        {"of": "spectrum.result:SingularShift", "rows": []},
        {"of": "spectrum.result:math", "row": ROW},
        {"of": "spectrum.result.math:inf", "row": ROW},
        {"of": "no_such_result:SingularShift", "row": ROW},
        {"of": "spectrum:SingularShifts", "row": ROW},
        {"row": ROW},
        [ROW],
        "gram",
    ],
)
def test_a_kept_row_is_believed_only_if_it_is_one(
    entry: object, opened: Callable[..., ModelPair]
) -> None:
    pair = opened()
    rows = KeptRows(pair, "any")
    row = next(i for i, each in enumerate(pair.tensors) if each.name == Q)
    matrix = Matrix(row, None, (14, 10))
    good = {"of": "spectrum.result:SingularShift", "row": ROW}
    assert rows._decoded(matrix, good) == SingularShift(Q, (14, 10), *ROW[2:])
    assert rows._decoded(matrix, entry) is None


@pytest.mark.parametrize("damage", [b"", b"damaged", b"\0" * 100])
def test_a_damaged_file_is_as_none(
    damage: bytes, files: Path, opened: Callable[..., ModelPair], measured: list[Matrix]
) -> None:
    expected = singular_shift(opened())
    count = len(measured)
    for path in (files / "kept").glob("*/*"):
        path.write_bytes(damage)
    assert singular_shift(opened()) == expected
    assert len(measured) == 2 * count
    assert singular_shift(opened()) == expected
    assert len(measured) == 2 * count


# The base


def test_a_base_is_decomposed_once_for_all_runs(
    files: Path, opened: Callable[..., ModelPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(files, "later", seed=12)
    time.sleep(cache._TICK_NS / 1e9 + 0.02)
    plain = singular_rotation(open_pair(files / "base", files / "later"), k=2, null=None)
    starts = []
    leading = subspaces.leading

    def counted(matrix: torch.Tensor, k: int, *, start: Any = None) -> Any:
        starts.append(start)
        return leading(matrix, k, start=start)

    monkeypatch.setattr(subspaces, "leading", counted)
    singular_rotation(opened(), k=2, null=None)
    assert sum(start is None for start in starts) == 5
    assert singular_rotation(opened("later"), k=2, null=None).per_tensor == plain.per_tensor
    assert sum(start is None for start in starts) == 5
    assert len(starts) == 15


def test_a_stack_is_hashed_once_for_all_its_matrices(files: Path) -> None:
    pair = open_pair(files / "base", files / "tuned")
    hashed = []
    fingerprint = pair.base.fingerprint
    pair.base.fingerprint = lambda name=None: hashed.append(name) or fingerprint(name)  # type: ignore[func-returns-value,method-assign]
    singular_rotation(pair, k=2, null=None)
    singular_rotation(pair, k=1, null=None)
    assert sorted(hashed) == sorted([EXPERTS, Q, K])


def test_of_a_live_base_nothing_old_is_taken() -> None:
    base, tuned = {Q: torch.diag(torch.arange(1.0, 9.0))}, {Q: torch.eye(8)}
    pair = open_pair(base, tuned)
    before = singular_shift(pair).shift
    base[Q].data.mul_(2)
    assert singular_shift(pair).shift != before


# How long it takes


class Clock:
    """A fake one: every matrix takes as many seconds as it costs, times a rate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
        self.now = 1000.0
        monkeypatch.setattr(matrix_work, "_clock", lambda: self.now)
        original = matrix_engines._Measuring._measure

        def measure(work: Any, batch: Any) -> Any:
            self.now += rate * sum(map(matrix_work._cost, batch))
            return original(work, batch)

        monkeypatch.setattr(matrix_engines._Measuring, "_measure", measure)


@pytest.mark.parametrize(
    ("minutes", "line"),
    [
        (0.9, None),
        (4.2, "displacing, 5 matrices: about 4 min"),
        (59.9, "displacing, 5 matrices: about 1 h 0 min"),
        (135, "displacing, 5 matrices: about 2 h 15 min"),
    ],
)
def test_a_long_run_says_how_long_after_its_first_matrix(
    minutes: float, line: str | None, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    shapes = [(14, 10), (10, 14), *[(8, 9)] * 3]
    total = sum(matrix_work._cost(Matrix(0, None, shape)) for shape in shapes)
    Clock(monkeypatch, 60 * minutes / total)
    displacement_rank(open_pair(files / "base", files / "tuned"))
    assert said == ([] if line is None else [line])


def test_a_run_that_is_killed_has_kept_what_took_a_minute(
    opened: Callable[..., ModelPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    remember = KeptRows.remember
    monkeypatch.setattr(
        KeptRows, "remember", lambda self, rows: (kept.append(len(rows)), remember(self, rows))
    )
    Clock(monkeypatch, 0.01)  # the larger two take a minute each
    displacement_rank(opened())
    assert kept == sorted(kept)
    assert kept[-1] == 5
    assert len(kept) >= 2


def test_rows_are_of_types_that_can_be_kept() -> None:
    from pytest_subnet.findings.displacement.result import DisplacementRank
    from pytest_subnet.findings.matrices.rows import _type_called

    for each in (DisplacementRank, RankOfUpdate, SingularRotation, SingularShift):
        name = f"{each.__module__.removeprefix('pytest_subnet.findings.')}:{each.__qualname__}"
        assert _type_called(name) is each


# On a GPU


@pytest.mark.parametrize("through_gram", [False, True])
def test_shifts_of_matrices_together_are_those_of_one_by_one(
    through_gram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, here on the CPU: three of one shape, and a stack; a row of zeros in one."""
    monkeypatch.setattr(spectra, "SMALL", 0 if through_gram else 256)
    base = {f"layers.{i}.q_proj.weight": random(12, 9, seed=i) for i in range(3)}
    base |= {EXPERTS: random(2, 8, 9, seed=5), "up_proj.weight": random(20, 9, seed=6)}
    base["layers.1.q_proj.weight"][3] = 0
    tuned = {name: each + 0.1 * random(*each.shape, seed=7) for name, each in base.items()}
    alone = singular_shift(open_pair(base, tuned))
    monkeypatch.setattr(matrix_engines, "_BATCHED_ON", "cpu")
    batches = []
    together_at = matrix_engines._Measuring._measure
    monkeypatch.setattr(
        matrix_engines._Measuring,
        "_measure",
        lambda self, batch: (batches.append(len(batch)), together_at(self, batch))[1],
    )
    base_cache._kept.clear()
    together = singular_shift(open_pair(base, tuned, device="cpu"))
    assert sorted(batches) == [1, 2, 3]
    for one, other in zip(together.per_tensor, alone.per_tensor, strict=True):
        assert one.shift == pytest.approx(other.shift, rel=1e-9)
        assert one._replace(shift=0) == other._replace(shift=0)


def test_a_matrix_that_does_not_fit_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_subnet.findings.matrices.work.free_bytes", lambda device: 100_000)
    base = {"small.weight": torch.eye(8), "large.weight": torch.ones(400, 50)}
    pair = open_pair(base, {name: 2 * each for name, each in base.items()})
    with pytest.raises(SelectionError) as error:
        singular_shift(pair)
    assert str(error.value) == (
        "large.weight of 400 x 50 needs about 200 kB of memory, and 100 kB are free; leave it out "
        "with exclude=, or measure where there is more"
    )
    assert singular_shift(pair, exclude="large*").shift == pytest.approx(1)
