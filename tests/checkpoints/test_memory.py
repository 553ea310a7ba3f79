"""Weights in memory: modules under any wrapper, and mappings of tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pytest_subnet import CheckpointError, open_checkpoint, open_pair, update_sparsity
from pytest_subnet.checkpoints.memory import from_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Tensors = dict[str, torch.Tensor]
    Same = Callable[[torch.Tensor, torch.Tensor], bool]
    Refusal = Callable[[Any], str]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


BLOCK = [
    "proj.weight",
    "norm.weight",
    "norm.bias",
    "norm.running_mean",
    "norm.running_var",
    "norm.num_batches_tracked",
]


def row_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().clone().reshape(-1).view(torch.uint8).tolist())


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_module_is_its_weights_and_persistent_buffers() -> None:
    module = Block()
    checkpoint = open_checkpoint(module)
    state = module.state_dict()
    assert checkpoint.names() == list(state) == BLOCK
    assert all(torch.equal(checkpoint.read(name), state[name]) for name in state)
    assert checkpoint.buffers == {name for name, _ in module.named_buffers()} - {"scratch"}
    assert checkpoint.label == "Block"
    assert checkpoint.config == {}
    assert checkpoint.shows_ties
    assert checkpoint.directory is None


def test_buffer_under_two_names_is_a_buffer_under_both() -> None:
    module = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    module[1].running_mean = module[0].running_mean
    checkpoint = open_checkpoint(module)
    assert {"0.running_mean", "1.running_mean"} <= checkpoint.buffers
    assert checkpoint.ties == {"1.running_mean": "0.running_mean"}


def test_tied_weights_are_known() -> None:
    assert open_checkpoint(Tied()).ties == {"head.weight": "embed.weight"}
    assert open_checkpoint(Tied().state_dict()).ties == {"head.weight": "embed.weight"}


def test_views_of_one_storage_are_no_ties() -> None:
    whole = torch.complex(torch.arange(6.0), torch.arange(6.0))
    tensors = {
        "whole": whole,
        "part": whole[:3],
        "shifted": whole[3:],
        "reshaped": whole.reshape(2, 3),
        "conjugate": whole.conj(),
        "imaginary": whole.imag,
        "negative": whole.conj().imag,
        "recast": whole.view(torch.int64),
        "other": whole.clone(),
        "nothing": whole[:0],
        "nothing either": whole[:0],
    }
    assert open_checkpoint(tensors).ties == {}


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_looks_through_wrappers(wrap: Callable[..., nn.Module]) -> None:
    module = Block()
    wrapped = wrap(module, backend="eager") if wrap is torch.compile else wrap(module)
    checkpoint = open_checkpoint(wrapped)
    assert checkpoint.names() == BLOCK
    assert checkpoint.label == "Block"
    assert checkpoint.identity() == open_checkpoint(module).identity()


def test_looks_through_a_compiled_model_that_ran() -> None:
    module = Block().eval()
    compiled = torch.compile(module, backend="eager")
    before = open_checkpoint(compiled).identity()
    compiled(torch.ones(2, 4))
    assert open_checkpoint(compiled).names() == BLOCK
    assert open_checkpoint(compiled).identity() == before


@pytest.mark.usefixtures("process_group")
def test_looks_through_data_parallel_wrappers_in_any_order() -> None:
    parallel = nn.parallel.DistributedDataParallel
    module = Block()
    for wrapped in (
        parallel(module),
        torch.compile(parallel(module), backend="eager"),
        parallel(torch.compile(module, backend="eager")),
    ):
        assert open_checkpoint(wrapped).names() == BLOCK
        assert open_checkpoint(wrapped).identity() == open_checkpoint(module).identity()


def test_names_that_wrappers_add_inside_the_model_are_dropped() -> None:
    module = nn.Sequential(torch.compile(Block(), backend="eager"), nn.Linear(4, 4))
    assert "0._orig_mod.proj.weight" in module.state_dict()
    checkpoint = open_checkpoint(module)
    assert checkpoint.names() == [*(f"0.{name}" for name in BLOCK), "1.weight", "1.bias"]
    assert checkpoint.buffers == {f"0.{name}" for name in BLOCK[3:]}


def test_names_that_would_collide_are_kept() -> None:
    inner = nn.Linear(2, 2, bias=False)
    outer = nn.Module()
    outer.weight = nn.Parameter(torch.ones(2, 2))
    outer._orig_mod = nn.Identity()
    module = nn.Sequential()
    module.add_module("a", outer)
    outer.add_module("_checkpoint_wrapped_module", inner)
    assert open_checkpoint(module).names() == ["a.weight", "a._checkpoint_wrapped_module.weight"]


def test_checkpoint_wrapper_is_looked_through() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    module = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)))
    assert open_checkpoint(module).names() == ["0.weight", "0.bias"]


def test_settings_that_a_module_saves_are_no_weights() -> None:
    class WithState(nn.Linear):
        def get_extra_state(self) -> torch.Tensor:
            return torch.zeros(3)

        def set_extra_state(self, state: Any) -> None: ...

    module = WithState(2, 2)
    module.my_extra_state = nn.Parameter(torch.ones(1))
    assert open_checkpoint(module).names() == ["weight", "bias", "my_extra_state"]


def test_config_of_a_transformers_model_is_plain() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16))
    checkpoint = open_checkpoint(model)
    assert checkpoint.config["model_type"] == "gpt2"
    assert checkpoint.ties == {"lm_head.weight": "transformer.wte.weight"}


@pytest.mark.parametrize("config", [None, {"a": 1}, "tiny"])
def test_config_of_another_sort_is_left_out(config: Any) -> None:
    module = nn.Linear(1, 1)
    module.config = config
    assert open_checkpoint(module).config == {}


def test_reads_every_dtype_and_shape(every_dtype: Tensors, same_bits: Same) -> None:
    checkpoint = open_checkpoint(every_dtype)
    assert checkpoint.names() == list(every_dtype)
    assert not checkpoint.shows_ties
    for name, tensor in every_dtype.items():
        info = checkpoint.info(name)
        assert getattr(torch, info.dtype) == tensor.dtype
        assert info.shape == tensor.shape
        whole = row_bytes(tensor)
        assert info.nbytes == len(whole)
        assert same_bits(checkpoint.read(name), tensor)
        assert bytes(checkpoint.view(name)) == whole
        buffer = bytearray(max(len(whole) - 1, 0))
        checkpoint.read_into(name, len(whole) - len(buffer), memoryview(buffer))
        assert buffer == whole[len(whole) - len(buffer) :]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(4, 6).t(),
        torch.arange(24)[::3],
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        torch.ones(1, dtype=torch.bfloat16).expand(3, 2),
        nn.Parameter(torch.ones(2)),
    ],
)
def test_bytes_are_in_row_order(tensor: torch.Tensor) -> None:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype)
    plain.copy_(tensor.detach())
    checkpoint = open_checkpoint({"a": tensor})
    buffer = bytearray(checkpoint.info("a").nbytes)
    checkpoint.read_into("a", 0, memoryview(buffer))
    view = checkpoint.view("a")
    assert (view is None) == (not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg())
    assert buffer == row_bytes(plain) == (buffer if view is None else bytes(view))
    assert checkpoint.fingerprint() == open_checkpoint({"a": plain}).fingerprint()


def test_view_is_no_copy_where_it_need_not_be() -> None:
    tensor = torch.ones(4)
    view = open_checkpoint({"a": tensor}).view("a")
    tensor[0] = 0
    assert bytes(view)[:4] == bytes(4)


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 9), (3, 5), (2, 1, 4), (2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64])
def test_any_piece_of_what_is_not_in_row_order(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    numbers = torch.arange(2.0 * math.prod(shape)).to(dtype)
    last_first = numbers[: math.prod(shape)].reshape(shape[::-1])
    last_first = last_first.permute(*reversed(range(len(shape))))
    for tensor in (numbers.reshape(*shape, 2)[..., 1], last_first):
        plain = torch.empty(shape, dtype=dtype)
        plain.copy_(tensor)
        whole = row_bytes(plain)
        checkpoint = open_checkpoint({"a": tensor})
        for start in range(len(whole)):
            for end in range(start, len(whole) + 1):
                buffer = bytearray(end - start)
                checkpoint.read_into("a", start, memoryview(buffer))
                assert buffer == whole[start:end]


@pytest.mark.parametrize("of_its_own", [True, False])
def test_what_is_not_in_row_order_is_read_as_it_is_now(of_its_own: bool) -> None:
    """Also where torch counts no write: through `.data`, and to a tensor made for inference."""
    with torch.inference_mode(mode=not of_its_own):
        tensor = torch.zeros(3, 2).t()
        pair = open_pair({"a": torch.zeros(2, 3)}, {"a": tensor})
        assert update_sparsity(pair).sparsity == 1
        (tensor.data if of_its_own else tensor).fill_(1)
        assert update_sparsity(pair).sparsity == 0


def test_rows_are_read_where_they_are() -> None:
    tensor = torch.arange(12.0).reshape(4, 3)
    checkpoint = open_checkpoint({"a": tensor, "one": torch.tensor(1.0)})
    assert torch.equal(checkpoint.read("a", slice(-3, -1)), tensor[1:3])
    assert checkpoint.read("a").data_ptr() == tensor.data_ptr()
    assert checkpoint.read("a", slice(3, 1)).shape == (0, 3)
    with pytest.raises(ValueError, match="has a step"):
        checkpoint.read("a", slice(None, None, 2))
    with pytest.raises(ValueError, match="one is a single number and has no rows"):
        checkpoint.read("one", slice(0, 1))


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 9), (8, 1), (-4, 2)])
def test_range_outside_the_tensor_is_an_error(start: int, count: int) -> None:
    checkpoint = open_checkpoint({"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match=f"a of dict of tensors has 8 bytes; bytes {start}"):
        checkpoint.read_into("a", start, memoryview(bytearray(count)))


def test_unknown_name_is_an_error() -> None:
    checkpoint = open_checkpoint({"a.weight": torch.ones(2)})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.view("a.wait")
    assert str(caught.value) == "dict of tensors has no tensor a.wait; did you mean a.weight?"


def test_identity_changes_when_a_tensor_is_written_to() -> None:
    module = Block()
    checkpoint = open_checkpoint(module)
    before = checkpoint.identity()
    assert checkpoint.identity() == before
    with torch.no_grad():
        module.proj.weight.add_(1)
    assert checkpoint.identity() != before


def test_identity_tells_copies_apart() -> None:
    state = {"a": torch.ones(2)}
    assert open_checkpoint(state).identity() == open_checkpoint(dict(state)).identity()
    assert open_checkpoint(state).identity() != open_checkpoint({"a": torch.ones(2)}).identity()


def test_tensors_made_in_inference_mode_are_taken() -> None:
    with torch.inference_mode():
        tensors = {"a": torch.ones(2), "b": torch.ones(2, 3).t()}
    checkpoint = open_checkpoint(tensors)
    assert checkpoint.identity() == checkpoint.identity()
    assert torch.equal(checkpoint.read("b"), torch.ones(3, 2))
    assert (
        checkpoint.fingerprint()
        == open_checkpoint({"a": torch.ones(2), "b": torch.ones(3, 2)}).fingerprint()
    )


def test_tensor_gives_the_very_one() -> None:
    module = Block()
    assert from_module(module).tensor("proj.weight") is module.proj.weight


def replace(module: Any) -> None:
    module.proj.weight = nn.Parameter(torch.zeros(4, 4))


def replace_module(module: Any) -> None:
    module.proj = nn.Linear(4, 4, bias=False)


def remove(module: Any) -> None:
    del module.proj


def parametrize(module: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(module.proj)


def put_in(module: Any) -> None:
    module.proj.weight.data = torch.zeros(4, 4)


@pytest.mark.parametrize("change", [replace, replace_module, remove, parametrize])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_replaced_parameter_is_never_read_as_it_was(
    change: Callable[[Any], None], wrapped: bool
) -> None:
    module: Any = Block()
    checkpoint = open_checkpoint(nn.DataParallel(module) if wrapped else module)
    before = checkpoint.identity()
    change(module)
    assert checkpoint.identity() != before
    for access in (checkpoint.read, checkpoint.view, checkpoint.fingerprint):
        with pytest.raises(CheckpointError) as caught:
            access("proj.weight")
        assert str(caught.value) == (
            "proj.weight of Block was replaced or removed after the model was opened; open the "
            "model again"
        )
    assert torch.equal(checkpoint.read("norm.weight"), torch.ones(4))  # the others are as they were


def test_a_replaced_buffer_is_never_read_as_it_was() -> None:
    module = Block()
    checkpoint = open_checkpoint(module)
    module.norm.running_mean = torch.ones(4)
    with pytest.raises(CheckpointError, match=r"norm\.running_mean of Block was replaced"):
        checkpoint.read("norm.running_mean")


def test_new_data_of_a_parameter_is_read() -> None:
    module = Block()
    checkpoint = open_checkpoint(module)
    before = checkpoint.identity()
    put_in(module)
    assert checkpoint.identity() != before
    assert not checkpoint.read("proj.weight").any()


def test_a_new_parameter_around_the_same_memory_is_the_same() -> None:
    module = Block()
    checkpoint = open_checkpoint(module)
    module.proj.weight = nn.Parameter(module.proj.weight.data, requires_grad=False)
    assert torch.equal(checkpoint.read("proj.weight"), module.proj.weight)


@pytest.mark.parametrize("change", [lambda module: module.half(), lambda module: module.double()])
def test_a_cast_of_the_model_is_noticed(change: Callable[[nn.Module], object]) -> None:
    module = Block()
    checkpoint = open_checkpoint(module)
    change(module)
    for access in (checkpoint.read, checkpoint.view, checkpoint.fingerprint):
        with pytest.raises(CheckpointError, match=r"proj\.weight of Block has another shape or dt"):
            access("proj.weight")


def test_a_parameter_that_a_hook_renames_is_followed() -> None:
    module = Block()
    module.register_state_dict_post_hook(
        lambda module, state, *_: state.update(renamed=state.pop("proj.weight"))
    )
    checkpoint = open_checkpoint(module)
    assert sorted(checkpoint.names()) == sorted(["renamed", *BLOCK[1:]])
    replace(module)
    with pytest.raises(CheckpointError, match="renamed of Block was replaced"):
        checkpoint.read("renamed")


class Detached(nn.Linear):
    def state_dict(self, *args: Any, **keywords: Any) -> Tensors:
        state = super().state_dict(*args, **keywords)
        return {f"my.{name}": tensor.detach() for name, tensor in state.items()}


def test_a_parameter_that_the_state_dict_detaches_and_renames_is_followed() -> None:
    module = Detached(2, 2)
    checkpoint = open_checkpoint(module)
    assert checkpoint.names() == ["my.weight", "my.bias"]
    with torch.no_grad():
        module.weight.fill_(3)
    assert torch.equal(checkpoint.read("my.weight"), torch.full((2, 2), 3.0))
    module.weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(CheckpointError, match=r"my\.weight of Detached was replaced"):
        checkpoint.read("my.weight")


def test_a_state_dict_that_raises_is_an_error_with_a_remedy(refusal: Refusal) -> None:
    class Broken(nn.Linear):
        def state_dict(self) -> Tensors:  # type: ignore[override]
            raise AssertionError

    assert refusal(Broken(2, 2)) == (
        "the state_dict of Broken cannot be had (TypeError: test_a_state_dict_that_raises_is_an_"
        "error_with_a_remedy.<locals>.Broken.state_dict() got an unexpected keyword argument "
        "'keep_vars'); pass a mapping of its tensors, as dict(model.named_parameters())"
    )


def test_a_config_that_is_none_of_transformers_is_left_out() -> None:
    class Config:
        def to_dict(self, resolve: bool) -> dict[str, object]:
            return {"tie_word_embeddings": resolve}

    module = Block()
    module.config = Config()  # type: ignore[assignment]
    assert open_checkpoint(module).config == {}


def test_a_parameter_that_a_hook_drops_is_a_weight_all_the_same() -> None:
    def drop(module: Any, state: Tensors, *_: object) -> None:
        del state["proj.weight"]

    module = Block()
    module.register_state_dict_post_hook(drop)
    assert "proj.weight" not in module.state_dict()
    checkpoint = open_checkpoint(module)
    assert checkpoint.names() == [*BLOCK[1:], "proj.weight"]
    assert torch.equal(checkpoint.read("proj.weight"), module.proj.weight)


def test_a_parameter_that_a_hook_splits_is_not_counted_twice() -> None:
    def split(module: Any, state: Tensors, *_: object) -> None:
        weight = state.pop("proj.weight")
        state.update(q=weight[:2], k=weight[2:])

    module = Block()
    module.register_state_dict_post_hook(split)
    assert sorted(open_checkpoint(module).names()) == sorted([*BLOCK[1:], "q", "k"])


def test_a_module_knows_its_buffers_and_a_mapping_does_not() -> None:
    module = Block()
    checkpoint = open_checkpoint(module)
    assert checkpoint.shows_buffers
    assert checkpoint.buffers == {*BLOCK[3:], "scratch"} & set(BLOCK)
    assert not open_checkpoint(module.state_dict()).shows_buffers


@pytest.mark.parametrize("settings", [{"scale": 1.0}, None, torch.ones(3)])
def test_settings_that_torch_keeps_in_a_state_dict_are_no_weights(
    tmp_path: Path, settings: object
) -> None:
    class Scaled(nn.Linear):
        def get_extra_state(self) -> Any:
            return settings

        def set_extra_state(self, state: Any) -> None: ...

    module = nn.Sequential(Scaled(2, 2, bias=False))
    assert "0._extra_state" in module.state_dict()
    torch.save(module.state_dict(), tmp_path / "model.pt")
    for source in (module, module.state_dict(), tmp_path / "model.pt"):
        assert open_checkpoint(source).names() == ["0.weight"]


def freed() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.untyped_storage().resize_(0)
    return tensor


def fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(2)


NO_DATA = (
    "has no data here: it is on the meta device, sharded or freed; "
    "load or gather the whole weights first"
)
NOT_DENSE = (
    "only dense tensors can be compared, "
    "convert it with .to_dense(), .dequantize() or .to_padded_tensor()"
)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.ones(2, device="meta"), NO_DATA),
        (freed, NO_DATA),
        (fake, NO_DATA),
        (lambda: torch.ones(2).to_sparse(), f"is stored as torch.sparse_coo; {NOT_DENSE}"),
        (
            lambda: torch.ones(2, 2).to_sparse_csr(),
            f"is stored as torch.sparse_csr; {NOT_DENSE}",
        ),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
            f"is stored as torch.qint8; {NOT_DENSE}",
        ),
        (
            lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
            f"is stored as a nested tensor; {NOT_DENSE}",
        ),
        (
            nn.parameter.UninitializedParameter,
            "has no shape yet; run the model once on an input first",
        ),
        (
            lambda: torch.ones(2, dtype=torch.complex32),
            "is torch.complex32, which cannot be compared; cast it first",
        ),
        (lambda: [1.0], "is list, not a tensor under a name; pass a state_dict"),
        (lambda: {"b": torch.ones(1)}, "is dict, not a tensor under a name; pass a state_dict"),
        (lambda: None, "is NoneType, not a tensor under a name; pass a state_dict"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, while it makes these
def test_what_has_no_plain_data_is_refused_by_name(
    refusal: Refusal, make: Callable[[], Any], said: str
) -> None:
    assert refusal({"fine": torch.ones(1), "odd\x07": make()}) == (
        f"odd\\x07 of dict of tensors {said}"
    )


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")  # of torch, about a mesh of one
def test_sharded_tensor_is_refused(refusal: Refusal) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    sharded = distribute_tensor(torch.ones(2, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
    assert refusal({"a": sharded}) == f"a of dict of tensors {NO_DATA}"
    assert open_checkpoint({"a": sharded.full_tensor()}).names() == ["a"]


@pytest.mark.parametrize(
    ("source", "label"), [({}, "dict of tensors"), (nn.Identity(), "Identity")]
)
def test_nothing_is_refused(refusal: Refusal, source: Any, label: str) -> None:
    assert refusal(source) == f"{label} holds no tensors; was it saved or built empty?"


def test_lazy_module_is_refused_until_it_ran(refusal: Refusal) -> None:
    module = nn.LazyLinear(3)
    assert refusal(module).startswith("weight of LazyLinear has no shape yet; run")
    module(torch.ones(1, 2))
    assert open_checkpoint(module).names() == ["weight", "bias"]
