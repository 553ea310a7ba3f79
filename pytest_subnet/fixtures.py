"""The fixtures. What they need is imported when they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from pytest_subnet.devices import follows
from pytest_subnet.errors import SubnetError
from pytest_subnet.gating.baseline_use import passed_key
from pytest_subnet.marker import what_is_wrong_with
from pytest_subnet.opened import chosen_device, opened_key
from pytest_subnet.reports.terminal import say
from pytest_subnet.settings import settings_key
from pytest_subnet.text import safe

if TYPE_CHECKING:
    import os
    from contextlib import AbstractContextManager
    from typing import NoReturn

    import torch

    from pytest_subnet.checkpoints.opening import Source
    from pytest_subnet.gating.baselines import Baseline
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
    try:
        return chosen_device(pytestconfig.stash[settings_key])
    except SubnetError as error:
        _fail(error)


@pytest.fixture(scope="session")
def open_model_pair(pytestconfig: pytest.Config) -> OpenModelPair:
    """Opens pairs of checkpoints; the same arguments twice give the same, already scanned, pair.

    Paths are relative to the rootdir. Takes what `pytest_subnet.open_pair` takes. Checkpoints that
    were written to in between, or models that were trained, are another pair.

        def test_two_runs(open_model_pair):
            assert_update_sparsity(open_model_pair("base", "run-1"), at_least=0.7)
    """
    return pytestconfig.stash[opened_key].pair


@pytest.fixture(scope="session")
def open_trajectory(pytestconfig: pytest.Config) -> OpenTrajectory:
    """Opens the checkpoints of a run in numeric order; asked again, gives the same, already read.

    Paths are relative to the rootdir. Takes what `pytest_subnet.open_trajectory` takes. A run that
    has gained a checkpoint, or one that was written to, is another trajectory.

        def test_run(open_trajectory):
            assert_step_sparsity(open_trajectory("run"), at_least=0.85)
    """
    return pytestconfig.stash[opened_key].trajectory


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


@pytest.fixture
def subnet_baseline(request: pytest.FixtureRequest) -> Iterator[Baseline]:
    """Holds a result to the one recorded in the repository, in `subnet_baselines/` beside the test.

    `--subnet-write-baselines` records it, when the test has passed. How far each number may be from
    the recorded one has no default: no two trainings give the same counts.

        def test_release(model_pair, subnet_baseline):
            result = assert_update_sparsity(model_pair, at_least=0.7)
            subnet_baseline.check(result, within={"sparsity": 0.02})
    """
    from pytest_subnet.gating.baselines import Baseline

    baseline = Baseline(request.node)
    yield baseline
    if request.node.stash.get(passed_key, False):
        try:
            baseline.write()
        except SubnetError as error:
            _fail(error)
