"""The fixtures. What they need is imported when they are used."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import pytest

from pytest_subnet.errors import SubnetError
from pytest_subnet.reports.session import report_key
from pytest_subnet.reports.terminal import say
from pytest_subnet.settings import locate, settings_key, shown

if TYPE_CHECKING:
    from collections.abc import Hashable
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import NoReturn

    import torch

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.checkpoints.opening import Source
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.causal_lm import CausalLMPair
    from pytest_subnet.pairs.opening import Rename, Vocab
    from pytest_subnet.training.recorder import KeepOn, RecordedUpdate


class OpenModelPair(Protocol):
    """What the fixture `open_model_pair` gives."""

    def __call__(
        self,
        base: Source,
        tuned: Source,
        *,
        rename: Rename | None = None,
        vocab: Vocab = "strict",
        as_dtype: str | None = None,
    ) -> ModelPair:
        """Open a pair, or give the one that was opened with these arguments before."""
        ...


class RecordUpdate(Protocol):
    """What the fixture `record_update` gives."""

    def __call__(
        self, model: torch.nn.Module, *, keep_on: KeepOn = "cpu"
    ) -> AbstractContextManager[RecordedUpdate]:
        """Record what a block of code does to `model`."""
        ...


@pytest.fixture(scope="session")
def subnet_device(pytestconfig: pytest.Config) -> str:
    """The device to work on: `"cuda:N"` where there is one, else `"cpu"`.

    `--subnet-device` names one; a GPU that was named and is not there is a failure. Under xdist the
    workers share out the GPUs that the caller can see.

        def test_forward(subnet_device):
            model.to(subnet_device)
    """
    asked = pytestconfig.stash[settings_key].device
    if asked == "cpu":
        return "cpu"
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of drivers it cannot use: no GPU, then
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is not None and (count == 0 or (":" in asked and int(asked[5:]) >= count)):
        _fail(
            f"--subnet-device {asked}: torch {torch.__version__} sees {count} CUDA devices; "
            "install a CUDA build of torch or check CUDA_VISIBLE_DEVICES, or ask for cpu"
        )
    if count == 0:
        return "cpu"
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    number = int(worker[2:]) if worker.startswith("gw") else 0
    return asked if asked is not None and ":" in asked else f"cuda:{number % count}"


@pytest.fixture(scope="session")
def open_model_pair(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> OpenModelPair:
    """Opens pairs of checkpoints; the same arguments twice give the same, already scanned, pair.

    Paths are relative to the rootdir. Takes what `pytest_subnet.open_pair` takes. Checkpoints that
    were written to in between, or models that were trained, are another pair.

        def test_two_runs(open_model_pair):
            assert_update_sparsity(open_model_pair("base", "run-1"), at_least=0.7)
    """
    settings = pytestconfig.stash[settings_key]
    device = request.getfixturevalue("subnet_device") if settings.device else None
    sources = _Sources(settings.root)
    pairs: dict[tuple[Hashable, ...], ModelPair] = {}

    def open_model_pair(
        base: Source,
        tuned: Source,
        *,
        rename: Rename | None = None,
        vocab: Vocab = "strict",
        as_dtype: str | None = None,
    ) -> ModelPair:
        from pytest_subnet.pairs.opening import open_pair
        from pytest_subnet.scan.gathering import declare

        left, right = sources.open(base), sources.open(tuned)
        renamed = tuple(sorted(rename.items())) if isinstance(rename, Mapping) else rename
        key = (left.label, left.identity(), right.label, right.identity(), renamed, vocab, as_dtype)
        if key not in pairs:
            pairs[key] = open_pair(
                left, right, rename=rename, vocab=vocab, as_dtype=as_dtype, device=device
            )
            declare(pairs[key], settings.parsed_tolerances())
            pytestconfig.stash[report_key].watch(pairs[key])
        return pairs[key]

    return open_model_pair


class _Sources:
    """Opens what `open_model_pair` is given; a path again only if its files were written to."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, tuple[Checkpoint, Hashable]] = {}

    def open(self, source: Source) -> Checkpoint:
        from pytest_subnet.checkpoints.opening import open_checkpoint

        if not isinstance(source, str | os.PathLike):
            return open_checkpoint(source)
        path = locate(os.fspath(source), self._root)
        if not self._is_good(path):
            checkpoint = open_checkpoint(path)
            checkpoint.label = shown(path, self._root)
            self._known[path] = checkpoint, checkpoint.identity()
        return self._known[path][0]

    def _is_good(self, path: str) -> bool:
        if path not in self._known:
            return False
        checkpoint, identity = self._known[path]
        try:
            return checkpoint.identity() == identity
        except SubnetError:  # a file is gone
            return False


@pytest.fixture(scope="session")
def model_pair(
    request: pytest.FixtureRequest, pytestconfig: pytest.Config, open_model_pair: OpenModelPair
) -> ModelPair:
    """The base and the tuned checkpoint, aligned tensor by tensor; data is read when measured.

    Named by `--subnet-base` and `--subnet-tuned`, by the ini keys `subnet_base` and `subnet_tuned`,
    or for one test by `@pytest.mark.model_pair(base=…, tuned=…)`.

        def test_release(model_pair):
            assert_update_sparsity(model_pair, at_least=0.70)
    """
    settings = pytestconfig.stash[settings_key]
    marked = getattr(request, "param", None)
    keywords = dict(marked or {"base": settings.base, "tuned": settings.tuned})
    missing = [f"--subnet-{side}" for side in ("base", "tuned") if not keywords[side]]
    if missing:
        _fail(
            f"model_pair has no checkpoints: pass {' and '.join(missing)} on the command line, "
            "set subnet_base and subnet_tuned in the ini file, or mark the test with "
            "@pytest.mark.model_pair(base=…, tuned=…)"
        )
    try:
        return open_model_pair(keywords.pop("base"), keywords.pop("tuned"), **keywords)
    except SubnetError as error:
        _fail(error)
    except (TypeError, ValueError) as error:
        if marked is None:
            raise
        _fail(f"@pytest.mark.model_pair: {error}")


@pytest.fixture(scope="session")
def causal_lm_pair(
    pytestconfig: pytest.Config, model_pair: ModelPair, subnet_device: str
) -> CausalLMPair:
    """Both models of `model_pair`, whole, loaded by transformers on `subnet_device`, in eval mode.

    A named tuple `(base, tuned, tokenizer)`; the tokenizer is None where there is none. Says before
    it loads what the two need and what is free, and fails when they do not fit.

        def test_still_talks(causal_lm_pair):
            base, tuned, tokenizer = causal_lm_pair
    """
    from pytest_subnet.pairs.causal_lm import load_causal_lm_pair, room_for

    try:
        say(pytestconfig, f"causal_lm_pair: {room_for(model_pair, subnet_device)}")
        return load_causal_lm_pair(model_pair, subnet_device)
    except SubnetError as error:
        _fail(error)


def _fail(reason: object) -> NoReturn:
    """Fail the tests that need the fixture; the reason is all there is to see."""
    raise pytest.fail.Exception(str(reason), pytrace=False) from None


@pytest.fixture
def record_update(pytestconfig: pytest.Config) -> RecordUpdate:
    """Records what a block of code does to the weights of a model in memory.

    Keeps a copy of the weights before: on the CPU, or with `keep_on="device"` beside the model.

        def test_step(record_update):
            with record_update(model) as update:
                trainer.train()
            assert_updated(update, "*lora_B*")
            assert_frozen(update, "*.base_layer.*")
    """
    from pytest_subnet.training import recorder

    tolerances = pytestconfig.stash[settings_key].parsed_tolerances()

    def record_update(
        model: torch.nn.Module, *, keep_on: KeepOn = "cpu"
    ) -> AbstractContextManager[RecordedUpdate]:
        return recorder.record_update(model, keep_on=keep_on, tolerances=tolerances)

    return record_update
