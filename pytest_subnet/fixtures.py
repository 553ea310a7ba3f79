"""The fixtures. What they need is imported when they are used."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import pytest

from pytest_subnet.errors import SubnetError
from pytest_subnet.reports.session import report_key
from pytest_subnet.reports.terminal import say
from pytest_subnet.settings import locate, settings_key

if TYPE_CHECKING:
    import torch

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

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is not None and (count == 0 or (":" in asked and int(asked[5:]) >= count)):
        pytest.fail(
            f"--subnet-device {asked}: torch {torch.__version__} sees {count} CUDA devices; "
            "install a CUDA build of torch or check CUDA_VISIBLE_DEVICES, or ask for cpu",
            pytrace=False,
        )
    if count == 0:
        return "cpu"
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    number = int(worker[2:]) if worker.startswith("gw") else 0
    return asked if asked is not None and ":" in asked else f"cuda:{number % count}"


@pytest.fixture(scope="session")
def open_model_pair(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> OpenModelPair:
    """Opens pairs of checkpoints; the same arguments twice give the same, already scanned, pair.

    Paths are relative to the rootdir. Takes what `pytest_subnet.open_pair` takes.

        def test_two_runs(open_model_pair):
            assert_update_sparsity(open_model_pair("base", "run-1"), at_least=0.7)
    """
    settings = pytestconfig.stash[settings_key]
    pairs: dict[tuple[object, ...], ModelPair] = {}
    kept_alive: list[object] = []

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

        sources = [
            locate(os.fspath(side), pytestconfig.rootpath)
            if isinstance(side, str | os.PathLike)
            else side
            for side in (base, tuned)
        ]
        key = (*(side if isinstance(side, str) else id(side) for side in sources),)
        key = (*key, id(rename), vocab, as_dtype)
        if key not in pairs:
            device = request.getfixturevalue("subnet_device") if settings.device else None
            pairs[key] = open_pair(
                sources[0],
                sources[1],
                rename=rename,
                vocab=vocab,
                as_dtype=as_dtype,
                device=device,
            )
            kept_alive.append((base, tuned, rename))  # an id is unique only while its object lives
            declare(pairs[key], settings.parsed_tolerances())
            pytestconfig.stash[report_key].watch(pairs[key])
        return pairs[key]

    return open_model_pair


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
    keywords = dict(getattr(request, "param", {"base": settings.base, "tuned": settings.tuned}))
    missing = [f"--subnet-{side}" for side in ("base", "tuned") if not keywords[side]]
    if missing:
        pytest.fail(
            f"model_pair has no checkpoints: pass {' and '.join(missing)} on the command line, "
            "set subnet_base and subnet_tuned in the ini file, or mark the test with "
            "@pytest.mark.model_pair(base=…, tuned=…)",
            pytrace=False,
        )
    try:
        return open_model_pair(keywords.pop("base"), keywords.pop("tuned"), **keywords)
    except SubnetError as error:
        pytest.fail(str(error), pytrace=False)


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
        pytest.fail(str(error), pytrace=False)


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
