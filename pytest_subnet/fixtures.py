"""The fixtures. What they need is imported when they are used."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from pytest_subnet.devices import follows
from pytest_subnet.errors import SubnetError
from pytest_subnet.marker import what_is_wrong_with
from pytest_subnet.reports.session import report_key
from pytest_subnet.reports.terminal import say
from pytest_subnet.settings import locate, settings_key, shown
from pytest_subnet.text import safe

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
    from pytest_subnet.trajectories import Trajectory


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


class OpenTrajectory(Protocol):
    """What the fixture `open_trajectory` gives."""

    def __call__(
        self,
        source: str | os.PathLike[str] | Sequence[Source],
        *,
        pattern: str = "checkpoint-*",
        as_dtype: str | None = None,
    ) -> Trajectory:
        """Open the checkpoints of a run, or give those that were opened before."""
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
    number = int(worker[2:] if worker.startswith("gw") else os.environ.get("LOCAL_RANK") or 0)
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
    device = settings.device
    if device and settings.engine != "ray":  # the GPUs of a cluster need not be here
        device = request.getfixturevalue("subnet_device")
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
        from pytest_subnet.scan.gathering import declare, remember_in

        _check_types(rename, vocab, as_dtype)
        left = sources.open(base)
        right = sources.open_on(left, tuned)
        renamed = tuple(sorted(rename.items())) if isinstance(rename, Mapping) else rename
        key = (left.label, left.identity(), right.label, right.identity(), renamed, vocab, as_dtype)
        if key not in pairs:
            pairs[key] = open_pair(
                left,
                right,
                rename=rename,
                vocab=vocab,
                as_dtype=as_dtype,
                device=device,
                engine=settings.engine,
            )
            declare(pairs[key], settings.parsed_tolerances())
            directory = _cache_directory(pytestconfig)
            if directory is not None:
                remember_in(pairs[key], directory)
            if not follows():  # all processes of a launcher read the same files
                pytestconfig.stash[report_key].watch(pairs[key])
        return pairs[key]

    return open_model_pair


def _cache_directory(config: pytest.Config) -> Path | None:
    """Where this run and its workers keep what they count; None without pytest's cache."""
    cache: pytest.Cache | None = getattr(config, "cache", None)  # none with -p no:cacheprovider
    if cache is None:
        return None
    try:
        return cache.mkdir("subnet")
    except OSError:  # nothing can be written below the rootdir
        return None


def _check_types(rename: object, vocab: object, as_dtype: object) -> None:
    """Raise for what `open_pair` cannot take, and no key of a known pair could hold."""
    for keyword, value in (("vocab", vocab), ("as_dtype", as_dtype)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{keyword}={safe(repr(value))} is not a string")
    if not isinstance(rename, Mapping):
        if rename is not None and not callable(rename):
            raise TypeError(
                f"rename={safe(repr(rename))} is neither a mapping from names in tuned to names in "
                "base nor a function"
            )
        return
    for name in (*rename, *rename.values()):
        if not isinstance(name, str):
            raise TypeError(f"rename maps names to names; {safe(repr(name))} is not a string")


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
            checkpoint.label = shown(checkpoint.label, self._root)
            self._known[path] = checkpoint, checkpoint.identity()
        return self._known[path][0]

    def open_on(self, base: Checkpoint, source: Source) -> Checkpoint:
        """As `open`; an adapter is opened on `base`."""
        from pytest_subnet.checkpoints.adapters.opening import is_adapter, open_adapter

        if not isinstance(source, str | os.PathLike):
            return self.open(source)
        path = locate(os.fspath(source), self._root)
        if not is_adapter(path):
            return self.open(source)
        return open_adapter(path, base, label=shown(path, self._root))

    def _is_good(self, path: str) -> bool:
        if path not in self._known:
            return False
        checkpoint, identity = self._known[path]
        try:
            return checkpoint.identity() == identity
        except SubnetError:  # a file is gone
            return False


@pytest.fixture(scope="session")
def open_trajectory(pytestconfig: pytest.Config) -> OpenTrajectory:
    """Opens the checkpoints of a run in numeric order; asked again, gives the same, already read.

    Paths are relative to the rootdir. Takes what `pytest_subnet.open_trajectory` takes. A run that
    has gained a checkpoint, or one that was written to, is another trajectory.

        def test_run(open_trajectory):
            assert_step_sparsity(open_trajectory("run"), at_least=0.85)
    """
    settings = pytestconfig.stash[settings_key]
    sources = _Sources(settings.root)
    known: dict[Hashable, Trajectory] = {}

    def open_trajectory(
        source: str | os.PathLike[str] | Sequence[Source],
        *,
        pattern: str = "checkpoint-*",
        as_dtype: str | None = None,
    ) -> Trajectory:
        from pytest_subnet.scan.following import declare
        from pytest_subnet.trajectories.opening import align, find_checkpoints, open_all

        _check_types(None, None, as_dtype)
        if isinstance(source, str | os.PathLike) and os.fspath(source):
            source = settings.root / os.path.expanduser(source)  # noqa: PTH111 - as in locate
        names, found = find_checkpoints(source, pattern)
        checkpoints = open_all(found, sources.open)
        key = (as_dtype, *((each.label, each.identity()) for each in checkpoints))
        if key not in known:
            known[key] = align(names, checkpoints, as_dtype)
            for pair in known[key].pairs:
                pair.engine = settings.engine
            declare(known[key], settings.parsed_tolerances())
        return known[key]

    return open_trajectory


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
    if hasattr(request, "param"):
        return _open_marked(request.param, open_model_pair)
    if settings.base is None or settings.tuned is None:
        _fail(settings.missing())
    try:
        return open_model_pair(settings.base, settings.tuned)
    except SubnetError as error:
        _fail(f"{error}\n{settings.from_ini}" if settings.from_ini else error)


def _open_marked(keywords: Any, open_model_pair: OpenModelPair) -> ModelPair:
    """The pair of the marker, or of a parameter that a test gave to `model_pair` itself."""
    wrong = what_is_wrong_with(keywords)
    if wrong:
        _fail(f'parametrize("model_pair", …, indirect=True) {wrong}')
    further = dict(keywords)
    try:
        return open_model_pair(further.pop("base"), further.pop("tuned"), **further)
    except SubnetError as error:
        _fail(error)
    except (TypeError, ValueError) as error:
        _fail(f"@pytest.mark.model_pair: {error}")


@pytest.fixture(scope="session")
def causal_lm_pair(
    request: pytest.FixtureRequest,
    pytestconfig: pytest.Config,
    model_pair: ModelPair,
    subnet_device: str,
) -> CausalLMPair:
    """Both models of `model_pair`, whole, loaded by transformers on `subnet_device`, in eval mode.

    A named tuple `(base, tuned, tokenizer)`; the tokenizer is None where there is none. Says before
    it loads what the two need and what is free, and fails when they do not fit. With the parameter
    `{"share_identical": True}` weights with the same bits in both are held once; then neither model
    can be trained, and a write to such a weight shows in both.

        def test_still_talks(causal_lm_pair):
            base, tuned, tokenizer = causal_lm_pair

        @pytest.mark.parametrize("causal_lm_pair", [{"share_identical": True}], indirect=True)
        def test_in_less_memory(causal_lm_pair): ...
    """
    from pytest_subnet.pairs.causal_lm import load_causal_lm_pair, room_for

    shares = _asks_to_share(getattr(request, "param", {}))
    try:
        room = room_for(model_pair, subnet_device, share_identical=shares)
        if not follows():
            say(pytestconfig, f"causal_lm_pair: {room}")
        return load_causal_lm_pair(model_pair, subnet_device, share_identical=shares)
    except SubnetError as error:
        _fail(error)


def _asks_to_share(keywords: object) -> bool:
    """What the parameter of `causal_lm_pair` asks for."""
    if keywords == {}:
        return False
    if not isinstance(keywords, Mapping) or keywords.keys() != {"share_identical"}:
        _fail(
            'parametrize("causal_lm_pair", …, indirect=True) takes {"share_identical": True} or '
            f'{{"share_identical": False}}, not {safe(repr(keywords))}'
        )
    return bool(keywords["share_identical"])


def _fail(reason: object) -> NoReturn:
    """Fail the tests that need the fixture; the reason is all there is to see."""
    raise pytest.fail.Exception(str(reason), pytrace=False) from None


@pytest.fixture
def record_update(pytestconfig: pytest.Config) -> RecordUpdate:
    """Records what a block of code does to the weights of a model in memory.

    Keeps a copy of the weights before: on the CPU, or with `keep_on="device"` beside the model.
    Under torchrun every process records its own part, and all get the counts of the whole model.

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
