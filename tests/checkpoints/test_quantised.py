"""Quantised checkpoints: read as what they stand for, refused by name, never compared unasked."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert import (
    CompressedTensorsDequantizer,
    FP8BlockDequantizer,
)
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pytest_subnet import (
    CheckpointError,
    PairMismatchError,
    open_checkpoint,
    open_pair,
    update_sparsity,
)
from pytest_subnet.checkpoints.quantised import fp8_blocks
from pytest_subnet.checkpoints.quantised.opening import dequantised
from pytest_subnet.checkpoints.recent import Recent
from pytest_subnet.scan import units

if TYPE_CHECKING:
    from pathlib import Path

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.layers.0.norm.weight"


def quantise(weight: torch.Tensor, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek's layout: codes in fp8 and a scale a block, so that `weight = codes * scale`."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block, 0, -rows % block))
    blocks = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    scales = blocks.abs().amax((1, 3)).clamp_min(1e-12) / 448.0
    codes = (blocks / scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return codes.to(torch.float8_e4m3fn).contiguous(), scales


def closed_form(codes: torch.Tensor, scales: torch.Tensor, block: int = 128) -> torch.Tensor:
    rows, columns = codes.shape
    wide = scales.float().repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)
    return codes.float() * wide[:, :columns]


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {UP: (300, 200), DOWN: (200, 300)}
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}


def fp8_tensors(weights: dict[str, torch.Tensor], block: int = 128) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {NORM: torch.ones(200, dtype=torch.bfloat16)}
    for name, weight in weights.items():
        tensors[name], tensors[f"{name}_scale_inv"] = quantise(weight, block)
    return tensors


FP8_CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def save(
    directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None
) -> str:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def as_mapping(checkpoint: Any) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def refused(source: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        dequantised(source)
    text = str(caught.value)
    assert text.isprintable()
    return text


def test_fp8_weights_are_read_as_what_they_stand_for(tmp_path, same_bits):
    tensors = fp8_tensors(random_weights())
    path = save(tmp_path / "fp8", tensors, FP8_CONFIG)
    checkpoint = dequantised(path)
    assert sorted(checkpoint.names()) == sorted([UP, DOWN, NORM])
    assert checkpoint.info(UP)[1:] == ((300, 200), "float32", 240_000)
    assert checkpoint.info(NORM).dtype == "bfloat16"
    for name in (UP, DOWN):
        expected = closed_form(tensors[name], tensors[f"{name}_scale_inv"])
        assert same_bits(checkpoint.read(name), expected)
        assert same_bits(checkpoint.read(name, slice(130, 131)), expected[130:131])
    assert same_bits(checkpoint.read(NORM), tensors[NORM])
    assert checkpoint.notes == (
        f"{path}: dequantised from fp8 in blocks of 128 x 128 to float32: which weights moved is "
        "partly the quantiser's doing",
    )


def test_fp8_is_bit_for_bit_what_the_library_makes_of_the_whole_file(tmp_path, same_bits):
    path = save(tmp_path / "fp8", fp8_tensors(random_weights()), FP8_CONFIG)
    library = FP8BlockDequantizer.from_pretrained(path, dtype=torch.float32)
    expected = library.process(load_file(tmp_path / "fp8" / "model.safetensors"))
    found = as_mapping(dequantised(path))
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in found)
    plain = {name: tensor.contiguous() for name, tensor in expected.items()}
    plain = open_checkpoint(save(tmp_path / "plain", plain))
    assert dequantised(path).fingerprint() == plain.fingerprint()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    strip=st.integers(1, 400),
    data=st.data(),
)
def test_any_range_of_bytes_of_any_blocks(rows, columns, block, strip, data):
    """Whatever part is asked for, however it is cut into strips: the bytes of the closed form."""
    generator = torch.Generator().manual_seed(rows * 41 + columns)
    codes = torch.randint(0, 127, (rows, columns), dtype=torch.uint8, generator=generator)
    grid = -(-rows // block[0]), -(-columns // block[1])
    scales = torch.rand(grid, generator=generator)
    wide = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)
    expected = codes.view(torch.float8_e4m3fn).float() * wide[:, :columns]
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    inner = open_checkpoint({"w": codes.view(torch.float8_e4m3fn), "w_scale_inv": scales})
    inner.config = config
    start = data.draw(st.integers(0, 4 * rows * columns))
    stop = data.draw(st.integers(start, 4 * rows * columns))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_blocks, "_STRIP_ENTRIES", strip)
        part = bytearray(stop - start)
        dequantised(inner).read_into("w", start, memoryview(part))
    assert bytes(part) == expected.numpy().tobytes()[start:stop]


def test_the_same_codes_with_other_scales_are_other_weights(tmp_path):
    tensors = fp8_tensors(random_weights())
    base = save(tmp_path / "base", tensors, FP8_CONFIG)
    scales = tensors[f"{UP}_scale_inv"].clone()
    scales[0, 0] *= 2
    tuned = save(tmp_path / "tuned", tensors | {f"{UP}_scale_inv": scales}, FP8_CONFIG)
    found = update_sparsity(open_pair(dequantised(base), dequantised(tuned)))
    moved = int((tensors[UP][:128, :128].float() != 0).sum())
    assert {row.name: row.updated for row in found.per_tensor} == {UP: moved, DOWN: 0, NORM: 0}
    assert (
        len([note for note in found.coverage.notes if "partly the quantiser's doing" in note]) == 2
    )


def test_a_quantised_side_gives_no_numbers_unless_asked_for(tmp_path):
    base = save(tmp_path / "base", fp8_tensors(random_weights(0)), FP8_CONFIG)
    tuned = save(tmp_path / "tuned", fp8_tensors(random_weights(1)), FP8_CONFIG)
    pair = open_pair(base, tuned)
    problems = {problem.name: problem for problem in pair.problems}
    assert set(problems) == {UP, DOWN, f"{UP}_scale_inv", f"{DOWN}_scale_inv"}
    assert problems[UP].kind == "quantised"
    with pytest.raises(PairMismatchError, match="4 quantised") as caught:
        update_sparsity(pair)
    assert "dequantised(PATH)" in str(caught.value)
    assert open_checkpoint(base).info(UP).dtype == "float8_e4m3fn"


def test_against_weights_in_bfloat16_by_a_cast_that_is_said(tmp_path):
    weights = random_weights()
    tensors = fp8_tensors(weights)
    made = {name: closed_form(tensors[name], tensors[f"{name}_scale_inv"]) for name in weights}
    base = save(tmp_path / "base", {name: weight.bfloat16() for name, weight in made.items()})
    quantised = {name: tensors[name] for name in tensors if name != NORM}
    tuned = dequantised(save(tmp_path / "tuned", quantised, FP8_CONFIG))
    assert {problem.kind for problem in open_pair(base, tuned).problems} == {"retyped"}
    found = update_sparsity(open_pair(base, tuned, as_dtype="bfloat16"))
    assert (found.updated, found.numel) == (0, 120_000)


def test_a_scan_in_many_units_counts_what_one_read_counts(tmp_path, monkeypatch):
    weights = random_weights()
    base = dequantised(save(tmp_path / "base", fp8_tensors(weights), FP8_CONFIG))
    weights[UP][7, 11] *= 1.5
    tuned = dequantised(save(tmp_path / "tuned", fp8_tensors(weights), FP8_CONFIG))
    expected = sum(int((base.read(name) != tuned.read(name)).sum()) for name in base.names())
    monkeypatch.setattr(units, "UNIT_BYTES", 5000)
    assert update_sparsity(open_pair(base, tuned)).updated == expected > 0


def test_no_more_than_a_strip_is_dequantised_at_a_time_and_none_twice(monkeypatch):
    codes, scales = quantise(torch.ones(700, 256))
    checkpoint = dequantised({UP: codes, f"{UP}_scale_inv": scales})
    made = []
    rows = fp8_blocks.Fp8BlocksCheckpoint._rows

    def counting(self: Any, name: str, top: int, bottom: int) -> torch.Tensor:
        made.append((top, bottom))
        return rows(self, name, top, bottom)

    monkeypatch.setattr(fp8_blocks.Fp8BlocksCheckpoint, "_rows", counting)
    monkeypatch.setattr(fp8_blocks, "_STRIP_ENTRIES", 2 * 128 * 256)
    checkpoint.read(UP)
    assert made == [(0, 256), (256, 512), (512, 700)]
    made.clear()
    checkpoint.read(UP, slice(130, 140))
    assert made == [(128, 256)]


@pytest.mark.slow
def test_memory_stays_that_of_a_strip(tmp_path):
    """Reading a matrix by ranges never holds it: 4 MB of codes are 16 MB of float32."""
    codes, scales = quantise(torch.ones(4096, 1024))
    path = save(tmp_path / "fp8", {UP: codes, f"{UP}_scale_inv": scales}, FP8_CONFIG)
    script = (
        "import resource, sys\n"
        "from pytest_subnet.checkpoints.quantised import fp8_blocks\n"
        "from pytest_subnet.checkpoints.quantised.opening import dequantised\n"
        "fp8_blocks._STRIP_ENTRIES = 128 * 1024\n"
        "opened = dequantised(sys.argv[1])\n"
        "buffer = memoryview(bytearray(1 << 20))\n"
        "def peak():\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"opened.read_into({UP!r}, 0, buffer)\n"
        "before = peak()\n"
        "for start in range(0, 1 << 24, 1 << 20):\n"
        f"    opened.read_into({UP!r}, start, buffer)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 8 * 1024


def test_a_view_travels_to_other_processes(tmp_path, same_bits):
    path = save(tmp_path / "fp8", fp8_tensors(random_weights()), FP8_CONFIG)
    checkpoint = dequantised(path)
    copy = pickle.loads(pickle.dumps(checkpoint))
    assert same_bits(copy.read(UP), checkpoint.read(UP))
    assert copy.identity() == checkpoint.identity() != open_checkpoint(path).identity()


def test_what_is_stored_plainly_is_read_by_the_scan_itself(tmp_path):
    path = save(tmp_path / "fp8", fp8_tensors(random_weights()), FP8_CONFIG)
    checkpoint = dequantised(path)
    assert checkpoint.extents(NORM, 2, 6) == open_checkpoint(path).extents(NORM, 2, 6)
    assert checkpoint.extents(UP, 0, 4) is None
    assert checkpoint.view(NORM) is checkpoint.view(UP) is None
    in_memory = dequantised(load_file(f"{path}/model.safetensors"))
    assert in_memory.view(UP) is None
    assert np.array_equal(in_memory.view(NORM), open_checkpoint(path).read(NORM).view(torch.uint8))


def test_dequantised_twice_is_dequantised_once(tmp_path):
    checkpoint = dequantised(save(tmp_path / "fp8", fp8_tensors(random_weights()), FP8_CONFIG))
    assert dequantised(checkpoint) is checkpoint


def test_a_file_that_changes_is_noticed(tmp_path):
    path = save(tmp_path / "fp8", fp8_tensors(random_weights(0)), FP8_CONFIG)
    checkpoint = dequantised(path)
    save_file(fp8_tensors(random_weights(1)), f"{path}/model.safetensors", {"format": "pt"})
    for look in (checkpoint.check_unchanged, lambda: checkpoint.read(UP)):
        with pytest.raises(CheckpointError, match="changed after it was opened"):
            look()


def test_headers_count_where_config_json_says_another_block_size(tmp_path, same_bits):
    tensors = fp8_tensors(random_weights())
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 32]}}
    path = save(tmp_path / "fp8", tensors, config)
    checkpoint = dequantised(path)
    assert same_bits(checkpoint.read(UP), closed_form(tensors[UP], tensors[f"{UP}_scale_inv"]))
    assert checkpoint.notes[1:] == (
        f"{path}: config.json says blocks of 64 x 32, the scales are those of 128 x 128, which "
        "were taken",
    )


def test_headers_count_where_config_json_says_another_format(tmp_path):
    config = {"quantization_config": {"quant_method": "a\x1bwq"}}
    path = save(tmp_path / "fp8", fp8_tensors(random_weights()), config)
    checkpoint = dequantised(path)
    assert checkpoint.info(UP).dtype == "float32"
    assert checkpoint.notes[1:] == (
        f"{path}: config.json says a\\x1bwq, its tensors are those of fp8 in blocks, which counts",
    )


def test_headers_count_where_no_config_json_says_anything(tmp_path):
    checkpoint = dequantised(save(tmp_path / "fp8", fp8_tensors(random_weights())))
    assert checkpoint.info(UP).dtype == "float32"
    assert len(checkpoint.notes) == 1


def test_blocks_of_another_size_and_scales_in_powers_of_two(tmp_path, same_bits):
    codes, _ = quantise(random_weights()[UP], 64)
    powers = torch.randint(100, 120, (5, 4), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    inner = open_checkpoint({UP: codes, f"{UP}_scale_inv": powers})
    inner.config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}
    assert same_bits(dequantised(inner).read(UP), closed_form(codes, powers, 64))


@pytest.mark.parametrize("dtype", fp8_blocks.FP8)
def test_every_fp8_is_multiplied_by_its_scales(same_bits, dtype):
    codes = torch.randn(5, 7).to(getattr(torch, dtype))
    inner = open_checkpoint({"w": codes, "w_scale_inv": torch.full((3, 4), 0.3).bfloat16()})
    inner.config = {"quantization_config": {"weight_block_size": [2, 2]}}
    expected = codes.float() * torch.tensor(0.3).bfloat16().float()
    assert same_bits(dequantised(inner).read("w"), expected)


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in fp8_tensors(random_weights()).items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without(f"{UP}_scale_inv"),
            f"{{path}} has weights in fp8 without their scales: {UP} (looked for {UP}_scale_inv); "
            "what they stand for cannot be known, save or download it again",
        ),
        (
            without(UP),
            f"{{path}} has scales of weights that it does not have: {UP}_scale_inv; a part of it "
            "is missing, save or download it again",
        ),
        (
            fp8_tensors(random_weights()) | {f"{UP}_scale_inv": torch.ones(2, 3)},
            f"{UP}_scale_inv of {{path}} is [2,3]; the scales of [300,200] in blocks of 128 x 128 "
            "are [3,2]; weight_block_size in config.json says the size of the blocks, mend it or "
            "save the checkpoint again",
        ),
        (
            fp8_tensors(random_weights()) | {f"{UP}_scale_inv": torch.ones(())},
            f"{UP}_scale_inv of {{path}} is []; the scales of [300,200] in blocks of 128 x 128 "
            "are [3,2]; weight_block_size in config.json says the size of the blocks, mend it or "
            "save the checkpoint again",
        ),
        (
            fp8_tensors(random_weights()) | {f"{UP}_scale_inv": torch.ones(3, 2).int()},
            f"{UP}_scale_inv of {{path}} is stored as int32, which no scales are; save the "
            "checkpoint again",
        ),
        (
            fp8_tensors(random_weights()) | {UP: torch.ones(300, 200).bfloat16()},
            f"{UP} of {{path}} has scales and is stored as bfloat16, not in fp8; save the "
            "checkpoint again",
        ),
        (
            fp8_tensors(random_weights()) | {UP: torch.ones(2, 3, 4).to(torch.float8_e4m3fn)},
            f"{UP} of {{path}} is f8_e4m3fn[2,3,4]; blocks are of matrices, dequantise it with "
            "the tool that wrote it and save it in bfloat16",
        ),
    ],
)
def test_scales_that_do_not_fit_are_found_when_it_is_opened(tmp_path, change, message):
    path = save(tmp_path / "fp8", change, FP8_CONFIG)
    assert refused(path) == message.format(path=path)


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("a.qweight", "AWQ or GPTQ"),
        ("a.weight.absmax", "bitsandbytes"),
        ("a.SCB", "bitsandbytes"),
        ("experts.down_proj_blocks", "MXFP4"),
        ("a.weight_scale_2", "NVFP4 as modelopt writes it"),
        ("a._weight_qdata", "torchao"),
        ("a.weight_packed", "compressed-tensors without its quantization_config in config.json"),
        ("a.weight_scale", "a scale a tensor or a channel (FBGEMM or modelopt)"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, name, called):
    config = {"quantization_config": {"quant_method": "its\x1bname"}}
    path = save(tmp_path / "other", {name: torch.zeros(2), "w": torch.zeros(2)}, config)
    assert refused(path) == (
        f"{path} is quantised in a format that is not read: {called} by the name of {name}, "
        "its\\x1bname by its config.json; dequantise it with the tool that wrote it, save it in "
        "bfloat16 and pass that"
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, ""),
        ({"quantization_config": [1]}, ""),
        (FP8_CONFIG, " (though its config.json says fp8)"),
        (
            {"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}},
            " (though its config.json says compressed-tensors)",
        ),
    ],
)
def test_what_is_not_quantised_is_to_be_passed_as_it_is(tmp_path, config, said):
    path = save(tmp_path / "plain", {"w": torch.ones(2, 2)}, config)
    assert refused(path) == (
        f"{path} is not quantised{said}: no tensor has scales; pass it as it is, without "
        "dequantised()"
    )


def test_without_its_library_the_extra_is_named(tmp_path, monkeypatch):
    path = save(tmp_path / "fp8", fp8_tensors(random_weights()), FP8_CONFIG)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    assert refused(path) == (
        f"to dequantise {path} needs compressed-tensors, which cannot be imported; "
        'pip install "pytest-subnet[quantised]"'
    )


def scheme(**arguments: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))


def scale_by(weight: torch.Tensor, group: int, most: float) -> torch.Tensor:
    groups = weight.float().unflatten(1, (-1, group))
    return (groups.abs().amax(-1) / most).to(weight.dtype)


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT4_ZEROS = INT4 | {"symmetric": False}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8_TENSOR = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
FP8_BLOCKS = FP8_TENSOR | {"strategy": "block", "block_structure": [16, 16]}
NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group"} | {
    "group_size": 16
}
SCHEMES = {
    "int4": ("pack-quantized", INT4),
    "int4 with zero points": ("pack-quantized", INT4_ZEROS),
    "int8": ("pack-quantized", INT8),
    "fp8 with a scale": ("float-quantized", FP8_TENSOR),
    "fp8 in blocks": ("float-quantized", FP8_BLOCKS),
    "nvfp4": ("nvfp4-pack-quantized", NVFP4),
}


def compress(kind: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of a weight as the library's own compressor makes them."""
    form, arguments = SCHEMES[kind]
    parts = {"weight": weight, "weight_scale": scale_by(weight, 32, 7)}
    if kind == "int4 with zero points":
        parts["weight_zero_point"] = torch.ones(weight.shape[0], 2, dtype=torch.int8)
    elif kind == "int8":
        parts["weight_scale"] = scale_by(weight, 64, 127)
    elif kind == "fp8 with a scale":
        parts["weight_scale"] = (weight.float().abs().amax() / 448).reshape(1)
    elif kind == "fp8 in blocks":
        parts["weight_scale"] = torch.full((weight.shape[0] // 16, 4), 0.01)
    elif kind == "nvfp4":
        parts["weight_scale"] = scale_by(weight, 16, 6) * 10
        parts["weight_global_scale"] = torch.tensor([10.0])
    made = BaseCompressor.get_value_from_registry(form).compress(parts, scheme(**arguments))
    return {name: part.contiguous() for name, part in made.items()}


def save_compressed(directory: Path, kind: str, *, seed: int = 0, **more: torch.Tensor) -> str:
    generator = torch.Generator().manual_seed(seed)
    form, arguments = SCHEMES[kind]
    tensors = {
        "lm_head.weight": torch.randn(8, 64, generator=generator).bfloat16(),
        "model.norm.weight": torch.ones(64).bfloat16(),
    }
    for module in ("up_proj", "gate_proj"):
        weight = torch.randn(16, 64, generator=generator).bfloat16()
        for part, tensor in compress(kind, weight).items():
            tensors[f"model.layers.0.mlp.{module}.{part}"] = tensor
    config = QuantizationConfig(
        config_groups={"group_0": scheme(**arguments)},
        format=form,
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    stated = {"quantization_config": json.loads(config.model_dump_json())}
    kept = {name: tensor for name, tensor in (tensors | more).items() if tensor.numel()}
    return save(directory, kept, {"model_type": "llama"} | stated)


@pytest.mark.parametrize("kind", SCHEMES)
def test_compressed_weights_are_what_the_library_makes_of_the_whole_file(tmp_path, same_bits, kind):
    path = save_compressed(tmp_path / "ct", kind)
    library = CompressedTensorsDequantizer(path, dtype=torch.float32)
    expected = library.process(load_file(f"{path}/model.safetensors"))
    checkpoint = dequantised(path)
    found = as_mapping(checkpoint)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in found)
    assert found["model.layers.0.mlp.up_proj.weight"].unique().numel() > 4
    assert pickle.loads(pickle.dumps(checkpoint)).fingerprint() == checkpoint.fingerprint()
    assert checkpoint.notes == (
        f"{path}: dequantised by compressed-tensors to float32: which weights moved is partly the "
        "quantiser's doing",
    )


@pytest.mark.parametrize("kind", ["int4", "fp8 with a scale"])
def test_pairs_of_compressed_checkpoints(tmp_path, kind):
    base = save_compressed(tmp_path / "base", kind)
    part = next(iter(set(compress(kind, torch.ones(16, 64).bfloat16())) & {"weight_scale"}))
    name = f"model.layers.0.mlp.up_proj.{part}"
    scales = open_checkpoint(base).read(name).clone()
    scales.view(-1)[0] *= 2
    tuned = save_compressed(tmp_path / "tuned", kind, **{name: scales})
    with pytest.raises(PairMismatchError, match=r"dequantised\(PATH\)"):
        update_sparsity(open_pair(base, tuned))
    pair = open_pair(dequantised(base), dequantised(tuned))
    assert pair.problems == ()
    found = update_sparsity(pair)
    before, after = as_mapping(pair.base), as_mapping(pair.tuned)
    moved = {name: int((before[name] != after[name]).sum()) for name in before}
    assert {row.name: row.updated for row in found.per_tensor} == moved
    assert moved["model.layers.0.mlp.up_proj.weight"] > 8
    assert sum(moved.values()) == moved["model.layers.0.mlp.up_proj.weight"]


def test_a_scheme_for_all_modules_leaves_those_without_scales_as_they_are(tmp_path, same_bits):
    """The library alone stops at an embedding that a scheme for `Linear` does not ignore."""
    embedding = {"model.embed_tokens.weight": torch.ones(8, 64).bfloat16()}
    path = save_compressed(tmp_path / "ct", "fp8 with a scale", **embedding)
    library = CompressedTensorsDequantizer(path, dtype=torch.float32)
    with pytest.raises(KeyError, match="embed_tokens"):
        library.process(load_file(f"{path}/model.safetensors"))
    found = dequantised(path)
    assert same_bits(found.read("model.embed_tokens.weight"), *embedding.values())
    assert found.info("model.layers.0.mlp.up_proj.weight").dtype == "float32"


def test_a_matrix_is_dequantised_once_however_many_units_it_is_cut_into(tmp_path, monkeypatch):
    base = dequantised(save_compressed(tmp_path / "base", "int4"))
    tuned = dequantised(save_compressed(tmp_path / "tuned", "int4", seed=1))
    made = []
    process = CompressedTensorsDequantizer.process

    def counting(self: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made.append((id(self), *tensors))
        return process(self, tensors)

    monkeypatch.setattr(CompressedTensorsDequantizer, "process", counting)
    monkeypatch.setattr(units, "UNIT_BYTES", 512)
    update_sparsity(open_pair(base, tuned))
    assert len(made) == len(set(made)) == 4


UP_PARTS = "model.layers.0.mlp.up_proj"
NONE = torch.empty(0)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "int4",
            {f"{UP_PARTS}.weight_scale": NONE},
            f"{{path}} lacks {UP_PARTS}.weight_scale, without which {UP_PARTS}.weight_packed "
            "cannot be dequantised; save or download it again",
        ),
        (
            "fp8 with a scale",
            {f"{UP_PARTS}.weight_scale": NONE},
            f"{{path}} lacks {UP_PARTS}.weight_scale, without which {UP_PARTS}.weight cannot be "
            "dequantised; save or download it again",
        ),
        (
            "int4",
            {f"{UP_PARTS}.weight_packed": NONE},
            "{path} has parts of compressed weights that nothing uses by the scheme in its "
            f"config.json: {UP_PARTS}.weight_shape, {UP_PARTS}.weight_scale; dequantise it with "
            "the tool that wrote it, save it in bfloat16 and pass that",
        ),
        (
            "int4",
            {f"{UP_PARTS}.weight_g_idx": torch.arange(64)},
            "{path} has parts of compressed weights that nothing uses by the scheme in its "
            f"config.json: {UP_PARTS}.weight_g_idx; dequantise it with the tool that wrote it, "
            "save it in bfloat16 and pass that",
        ),
        (
            "int4",
            {f"{UP_PARTS}.weight_shape": torch.tensor([16, 1 << 40])},
            f"{UP_PARTS}.weight_shape of {{path}} is [16, 1099511627776], which is not what "
            "i32[16,8] holds; save the checkpoint again",
        ),
        (
            "int4",
            {f"{UP_PARTS}.weight_shape": torch.zeros(1000)},
            f"{UP_PARTS}.weight_shape of {{path}} is [], which is not what i32[16,8] holds; save "
            "the checkpoint again",
        ),
        (
            "int4",
            {f"{UP_PARTS}.weight": torch.ones(16, 64)},
            f"{{path}} has {UP_PARTS}.weight both compressed and plain; which one counts cannot "
            "be known, save it again",
        ),
    ],
)
def test_parts_that_do_not_fit_are_found_when_it_is_opened(tmp_path, kind, change, message):
    path = save_compressed(tmp_path / "ct", kind, **change)
    assert refused(path) == message.format(path=path)


def test_scales_of_another_shape_are_an_error_in_our_words(tmp_path):
    change = {f"{UP_PARTS}.weight_scale": torch.ones(3, 5).bfloat16()}
    path = save_compressed(tmp_path / "ct", "int4", **change)
    with pytest.raises(CheckpointError) as caught:
        dequantised(path).read(f"{UP_PARTS}.weight")
    text = str(caught.value)
    assert text.startswith("compressed-tensors cannot make anything of")
    assert f"{UP_PARTS}.weight_packed of {path}" in text
    assert text.isprintable()


def test_a_scheme_that_is_none_is_refused(tmp_path):
    path = save_compressed(tmp_path / "ct", "int4")
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": 3}}
    (tmp_path / "ct" / "config.json").write_text(json.dumps(config))
    assert refused(path).startswith(
        f"compressed-tensors cannot make anything of {path}/config.json ("
    )


def test_compressed_weights_in_memory_have_no_config_beside_them(tmp_path):
    path = save_compressed(tmp_path / "ct", "int4")
    inner = open_checkpoint(load_file(f"{path}/model.safetensors"))
    inner.config = open_checkpoint(path).config
    assert refused(inner) == (
        "dict of tensors is not in a directory; how its weights are compressed stands in the "
        "config.json beside them, pass the directory"
    )


def test_what_one_thread_makes_the_others_wait_for():
    recent: Recent[int] = Recent()
    made = []
    barrier = threading.Barrier(4)

    def make() -> int:
        made.append(threading.get_ident())
        return len(made)

    def ask(found: list[int]) -> None:
        barrier.wait()
        found.extend(recent.get(str(number), 1, make) for number in range(50))

    results: list[list[int]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=ask, args=(each,)) for each in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 50
    assert results[0] == results[1] == results[2] == results[3]


def test_what_was_made_is_kept_up_to_its_bound_and_an_error_is_not_kept():
    recent: Recent[str] = Recent()
    large = 200 * 1024 * 1024
    assert recent.get("a", large, lambda: "first") == "first"
    assert recent.get("a", large, lambda: "second") == "first"
    assert recent.get("b", large, lambda: "b") == "b"
    assert recent.get("b", large, lambda: "again") == "b"
    assert recent.get("a", 1, lambda: "second") == "second"

    def fail() -> str:
        raise ValueError("once")

    with pytest.raises(ValueError, match="once"):
        recent.get("c", 1, fail)
    assert recent.get("c", 1, lambda: "c") == "c"
