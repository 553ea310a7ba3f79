"""What a run is, for whoever shows it: plain data, the same in HTML, JSON and Markdown.

Built once, by the controller, from what tests recorded. Every text in it is printable: control
characters are written out, secrets are gone, and only messages have several lines. What `<`, `|` or
a backtick mean where it is shown is for whoever shows it. `schema.json` beside this file describes
it to programs; a test holds the two to each other.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, TypedDict

VERSION = 1
"""Of the format: raised when a field changes its meaning or goes."""

Outcome: TypeAlias = Literal["passed", "failed", "error", "skipped", "xfailed", "xpassed"]
Plain: TypeAlias = bool | int | float | str | None


class Frame(TypedDict):
    """A table, a list a row; numbers as numbers, None where there is none.

    Attributes:
        columns: what stands in each row.
        rows: the values of one row, in the order of the columns.
    """

    columns: list[str]
    rows: list[list[Plain]]


class Measured(TypedDict):
    """One result that a test measured or judged.

    Attributes:
        finding: `"update_sparsity"`, `"mask_overlap"`, …
        numbers: what its `to_dict()` says, without the finding.
        tensors: its `per_tensor`, where it has one: `name`, `kind`, `layer`, `shape` and the
            finding's own numbers.
    """

    finding: str
    numbers: dict[str, object]
    tensors: Frame | None


class Test(TypedDict):
    """One test or one item of a policy.

    Attributes:
        nodeid: as pytest names it.
        outcome: what came of it; an error in setup or teardown is `"error"`.
        seconds: how long setup, call and teardown took.
        message: why it failed, was skipped or was expected to fail; empty when it passed.
        file: where it stands, relative to the rootdir.
        line: from 1 on.
        gate: whether it is about weights: it measured some, asked for a fixture of this plugin, or
            is an item of a policy.
        results: in the order in which they were measured.
    """

    nodeid: str
    outcome: Outcome
    seconds: float
    message: str
    file: str
    line: int
    gate: bool
    results: list[Measured]


class Side(TypedDict):
    """One checkpoint of a pair.

    Attributes:
        label: how messages name it; without credentials.
        fingerprint: of its content; None where nobody asked for it.
    """

    label: str
    fingerprint: str | None


class Pair(TypedDict):
    """A pair that was scanned.

    Attributes:
        pair: `base -> tuned`.
        base: the checkpoint before.
        tuned: the checkpoint after.
        notes: what a reader of the numbers must know.
        total: tensors in the pair, buffers and integer tensors apart.
        entries: in the tensors that were scanned.
        updated: of these, entries with other bits.
        beyond: of these, entries that changed by more than 1e-5.
        tensors: one row each: `name`, `kind`, `layer`, `dtype`, `shape` (as text), `entries`,
            `updated`, `beyond`, `max_change`, `change_norm`, `base_norm`.
        published: one row for each published number beside it: `source`, `model`, `algorithm`,
            `tolerance`, `dtype`, `sparsity`, `comparable`.
    """

    pair: str
    base: Side
    tuned: Side
    notes: list[str]
    total: int
    entries: int
    updated: int
    beyond: int
    tensors: Frame
    published: Frame


class Run(TypedDict):
    """A run, whole.

    Attributes:
        version: `VERSION` when it was written.
        passed: whether everything that ran passed, and something did.
        counts: tests by outcome.
        tests: in the order in which they ran; none where no tests did (`pytest-subnet diff`).
        pairs: in the order of their labels.
        environment: versions, platform, device, engine, settings: what and which; `selection` where
            options left tests out, `baselines` where they were not compared.
    """

    version: int
    passed: bool
    counts: dict[str, int]
    tests: list[Test]
    pairs: list[Pair]
    environment: dict[str, str]
