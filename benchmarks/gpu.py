"""Everything on one GPU: first that the kernels agree, then how fast they are.

    python benchmarks/gpu.py [--quick] [--directory DIRECTORY]

needs a CUDA device and torch, triton, numpy, numba, scipy and safetensors; nothing is downloaded or
installed. Takes under 8 minutes, most of them for `torch.linalg.matrix_rank`, and prints a table in
Markdown last. Files (2 x 8 GB) are written to a temporary directory, or to DIRECTORY.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # nothing to install

from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.scan import PAPER, Tolerance
from pytest_subnet.scan.counters import Counters
from pytest_subnet.scan.found import Found

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GPU = "cuda:0"
TOLERANCES = (PAPER, Tolerance(rtol=1e-3), Tolerance(atol=0.0), Tolerance(rtol=2.0**-8))
TOLERANCES += (Tolerance(atol=1e-45), Tolerance(rtol=1e30), Tolerance(atol=1e300))
WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

rows: list[tuple[str, str, str]] = []


def note(what: str, measured: str, wanted: str = "-") -> None:
    """A row of the table, shown at once and again at the end."""
    rows.append((what, measured, wanted))
    print(f"  {what}: {measured}", flush=True)


def cases(dtype: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Raw words of both sides: random bits, weights, too small and too large ones, zeros."""
    random = np.random.default_rng(11)
    word = WORD[DTYPES[dtype].itemsize]
    bits = 8 * word().itemsize
    for entries in (1, 7, 1 << 12, (1 << 20) + 4099):
        base = (
            random.integers(0, 1 << bits, entries, word)
            if bits < 64
            else random.integers(0, 2**64 - 1, entries, word)
        )
        yield "random bits", base, np.where(random.random(entries) < 0.5, base, base[::-1])
    info = torch.finfo(getattr(torch, dtype))
    scales = {"weights": 0.02, "tiny": info.tiny**0.5 * 1e-3, "huge": info.max**0.5 * 1e3}
    for name, scale in (*scales.items(), ("subnormal", info.tiny / 4), ("zero", 0.0)):
        entries = (1 << 18) + 77
        values = torch.from_numpy(random.standard_normal(entries) * scale)
        base = values.to(getattr(torch, dtype)).view(torch.uint8).numpy().view(word)
        tuned = base + (random.random(entries) < 0.15).astype(word)
        tuned[::1000] = base[::1000] ^ word(1 << (bits - 1))
        yield name, base, tuned


def check_kernels() -> None:
    """Hold Triton, torch on the GPU and torch on the CPU to the compiled kernel's integers."""
    from pytest_subnet.scan.kernels import choose_kernel
    from pytest_subnet.scan.mask_kernel import NumbaMaskKernel
    from pytest_subnet.scan.torch_kernel import TorchKernel
    from pytest_subnet.scan.triton_kernel import TritonKernel, TritonMaskKernel

    compiled = choose_kernel("cpu")
    compared = 0
    for dtype in ARITHMETIC:
        for name, base, tuned in cases(dtype):
            size = base.size
            cuts = sorted({0, size // 3, size // 2 // 8 * 8, size - 1, size})
            bounds = np.array(cuts, np.int64)
            raw = [side.copy().view(np.uint8) for side in (base, tuned)]
            on_gpu = [torch.from_numpy(side).to(GPU) for side in raw]

            def counted(kernel, sides, asked=TOLERANCES, bounds=bounds, dtype=dtype) -> Counters:
                counters = Counters(len(bounds) - 1, asked)
                kernel(*sides, dtype, bounds, counters)
                return counters

            wanted = counted(compiled, raw)
            for kernel, sides in ((TorchKernel(), on_gpu), (TritonKernel(), on_gpu)):
                got = counted(kernel, sides)
                where = f"{type(kernel).__name__}, {dtype}, {name}, {size} entries"
                if (got.integers != wanted.integers).any():
                    raise SystemExit(f"{where}:\n{got.integers}\nnot\n{wanted.integers}")
                with np.errstate(all="ignore"):
                    np.testing.assert_allclose(got.sums, wanted.sums, 1e-5, err_msg=where)
                    np.testing.assert_allclose(got.peaks, wanted.peaks, 1e-6, err_msg=where)
                compared += got.integers.size
            for tolerance in (Tolerance(), PAPER, Tolerance(rtol=1e-3)):
                found = [Found(bounds, dtype, tolerance) for _ in range(2)]
                counters = [Counters(len(bounds) - 1, TOLERANCES[:2]) for _ in range(2)]
                NumbaMaskKernel()(*raw, dtype, bounds, counters[0], found[0])
                TritonMaskKernel()(*on_gpu, dtype, bounds, counters[1], found[1])
                for what in ("words", "population", "members"):
                    if (getattr(found[0], what) != getattr(found[1], what)).any():
                        raise SystemExit(f"mask {what}: {dtype}, {name}, {tolerance}, {size}")
                compared += found[0].words.size
        print(f"  {dtype} agrees", flush=True)
    note("integers and mask words equal on Numba, torch and Triton", f"all {compared:,}", "all")


def check_other_dtypes() -> None:
    """Bytes and integers are compared by bits, with the NaN and Inf of 8-bit floats."""
    from pytest_subnet.scan import bits_kernel
    from pytest_subnet.scan.triton_kernel import TritonKernel

    random = np.random.default_rng(5)
    for dtype, described in DTYPES.items():
        if dtype in ARITHMETIC:
            continue
        for entries in (3, 1 << 13, (1 << 16) + 77):
            base, other = random.integers(0, 256, (2, entries * described.itemsize), np.uint8)
            tuned = np.where(random.random(base.size) < 0.8, base, other)
            bounds = np.array([0, entries // 2, entries], np.int64)
            counters = [Counters(2, TOLERANCES[:2]) for _ in range(2)]
            bits_kernel.compare(base, tuned, dtype, bounds, counters[0])
            sides = [torch.from_numpy(side).to(GPU) for side in (base, tuned)]
            TritonKernel()(*sides, dtype, bounds, counters[1])
            if (counters[0].integers != counters[1].integers).any():
                raise SystemExit(f"{dtype}: {counters[1].integers} not {counters[0].integers}")
    note("integers equal for float8, integers, bool, complex", "all", "all")


def seconds(work: Callable[[], object], rounds: int) -> float:
    """The median time of `work`, which is waited for; once more before, to compile."""
    work()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def weights(entries: int, seed: int) -> torch.Tensor:
    """Random bfloat16 weights on the GPU."""
    generator = torch.Generator(GPU).manual_seed(seed)
    return torch.empty(entries, dtype=torch.bfloat16, device=GPU).normal_(
        0, 0.02, generator=generator
    )


def moved(base: torch.Tensor, seed: int) -> torch.Tensor:
    """`base` with 15 % of its entries one step apart."""
    generator = torch.Generator(GPU).manual_seed(seed)
    chosen = torch.empty(base.numel(), dtype=torch.uint8, device=GPU)
    chosen.random_(0, 100, generator=generator)
    return (base.view(torch.int16) + (chosen < 15)).view(torch.bfloat16)


def measure_in_memory(entries: int) -> None:
    """Tensors in GPU memory: the share of the copy's bandwidth."""
    from pytest_subnet.scan.torch_kernel import TorchKernel
    from pytest_subnet.scan.triton_kernel import TritonKernel, TritonMaskKernel

    base = weights(entries, 1)
    tuned = moved(base, 2)
    target = torch.empty_like(base)
    copied = 2 * base.nbytes / seconds(lambda: target.copy_(base), 20)
    note("copy in GPU memory, bytes read and written", f"{copied / 1e12:.2f} TB/s")
    for dtype, least in (("bfloat16", "0.70"), ("float16", "-"), ("float32", "-")):
        sides = [side.view(torch.uint8) for side in (base, tuned)]
        bounds = np.array([0, base.nbytes // DTYPES[dtype].itemsize], np.int64)
        for asked in ((PAPER,), TOLERANCES[:4]):
            took = seconds(
                lambda sides=sides, dtype=dtype, bounds=bounds, asked=asked: TritonKernel()(
                    *sides, dtype, bounds, Counters(1, asked)
                ),
                10,
            )
            rate = 2 * base.nbytes / took
            note(
                f"compare in GPU memory, {dtype}, {len(asked)} tolerance(s), over the copy",
                f"{rate / copied:.2f} ({rate / 1e12:.2f} TB/s)",
                least if len(asked) == 1 else "-",
            )
    bounds = np.array([0, entries], np.int64)
    found = Found(bounds, "float32", Tolerance())  # the bits alone: no strata
    found.population = np.zeros((1, 0), np.int64)
    took = seconds(
        lambda: TritonMaskKernel()(
            *(side.view(torch.uint8) for side in (base, tuned)),
            "bfloat16",
            bounds,
            Counters(1, (PAPER,)),
            found,
        ),
        5,
    )
    rate = 2 * base.nbytes / took
    note("counters and mask bits, bits brought to the CPU", f"{rate / 1e12:.2f} TB/s")
    full = Found(bounds, "bfloat16", Tolerance())
    took = seconds(
        lambda: TritonMaskKernel()(
            *(side.view(torch.uint8) for side in (base, tuned)),
            "bfloat16",
            bounds,
            Counters(1, (PAPER,)),
            full,
        ),
        2,
    )
    note("counters, mask bits and strata", f"{2 * base.nbytes / took / 1e12:.2f} TB/s")
    part = entries // 16
    sides = [side[:part].view(torch.uint8) for side in (base, tuned)]
    bounds = np.array([0, part], np.int64)
    reference = seconds(lambda: TorchKernel()(*sides, "bfloat16", bounds, Counters(1, (PAPER,))), 3)
    ours = seconds(lambda: TritonKernel()(*sides, "bfloat16", bounds, Counters(1, (PAPER,))), 10)
    note("Triton against the reference in torch, same GPU", f"{reference / ours:.0f} x")
    measure_pair_in_memory(base, tuned, copied)


def measure_pair_in_memory(base: torch.Tensor, tuned: torch.Tensor, copied: float) -> None:
    """The same through a pair of models in memory: planning, table and report included."""
    from pytest_subnet import open_pair
    from pytest_subnet.scan.gathering import scan

    count = 128
    named = [
        {
            f"model.layers.{i}.mlp.up_proj.weight": part.view(4096, -1)
            for i, part in enumerate(parts)
        }
        for parts in (base.chunk(count), tuned.chunk(count))
    ]
    pair = open_pair(*named, device=GPU)
    took = seconds(lambda: scan(pair, range(len(pair.tensors)), (PAPER,)), 5)
    rate = 2 * base.nbytes / took
    note(
        f"scan of a pair in GPU memory, {count} tensors, over the copy",
        f"{rate / copied:.2f} ({rate / 1e12:.2f} TB/s)",
        "0.70",
    )


def measure_rank(quick: bool) -> None:
    """Rank on the GPU against `torch.linalg.matrix_rank` on the same GPU."""
    from pytest_subnet.findings.matrices.spectra import Spectrum

    m, n = (512, 1792) if quick else (4096, 14336)
    generator = torch.Generator(GPU).manual_seed(3)
    matrix = torch.empty(m, n, device=GPU).normal_(0, 1e-5, generator=generator)
    matrix[:, : n // 2] *= 10 ** torch.linspace(0, -3, n // 2, device=GPU)
    limit_of = max(m, n) * torch.finfo(torch.float32).eps

    def rank() -> int:
        spectrum = Spectrum(matrix)
        return spectrum.count_above(spectrum.largest() * limit_of)

    torch.linalg.matrix_rank(matrix[:64, :256])
    start = time.perf_counter()
    wanted = int(torch.linalg.matrix_rank(matrix))
    theirs = time.perf_counter() - start
    ours = seconds(rank, 5)
    got = rank()
    note(
        f"rank of {m} x {n} against torch.linalg.matrix_rank ({theirs:.2f} s, {wanted})",
        f"{theirs / ours:.0f} x ({ours * 1e3:.0f} ms, {got})",
        "20 x",
    )


def write_pair(root: Path, entries: int) -> tuple[Path, Path]:
    """A bfloat16 pair of one file a side, written from the GPU."""
    from safetensors.torch import save_file

    paths = root / "base", root / "tuned"
    count = 64
    base = weights(entries, 7)
    for path, side in zip(paths, (base, moved(base, 8)), strict=True):
        path.mkdir(parents=True)
        named = {
            f"model.layers.{i}.mlp.up_proj.weight": part.view(4096, -1).cpu()
            for i, part in enumerate(side.chunk(count))
        }
        save_file(named, path / "model.safetensors")
        (path / "config.json").write_text('{"model_type": "llama"}')
    return paths


def pinned_rate(nbytes: int = 1 << 30) -> float:
    """Bytes a second from pinned memory to the device."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=GPU)
    return nbytes / seconds(lambda: target.copy_(source, non_blocking=True), 10)


def read_rate(paths: tuple[Path, ...], threads: int, piece: int = 4 << 20) -> float:
    """Bytes a second from the page cache into reused buffers, and nothing else."""
    import os

    ranges = iter([(p, at) for p in paths for at in range(0, p.stat().st_size - piece, piece)])
    total = sum(p.stat().st_size for p in paths)

    def work() -> None:
        files = {path: os.open(path, os.O_RDONLY) for path in paths}
        room = memoryview(bytearray(piece))
        for path, at in ranges:
            os.preadv(files[path], [room], at)
        for file in files.values():
            os.close(file)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return total / (time.perf_counter() - start)


def measure_from_files(root: Path, entries: int) -> None:
    """From the page cache: the share of the slower of reading and copying to the device."""
    from pytest_subnet import open_pair
    from pytest_subnet.scan.engines import cores
    from pytest_subnet.scan.gathering import scan

    base, tuned = write_pair(root, entries)
    torch.cuda.empty_cache()
    files = tuple(path / "model.safetensors" for path in (base, tuned))
    nbytes = sum(path.stat().st_size for path in files)
    read_rate(files, cores())
    read = statistics.median(read_rate(files, cores()) for _ in range(3))
    copy = pinned_rate()
    note("pinned memory to the device", f"{copy / 1e9:.1f} GB/s")
    note(f"page cache into buffers, {cores()} threads", f"{read / 1e9:.1f} GB/s")
    counted = {}
    for device in (GPU, "cpu"):
        pair = open_pair(base, tuned, device=device)
        everything = range(len(pair.tensors))
        counted[device] = scan(pair, everything, (PAPER,)).integers
        rate = nbytes / seconds(lambda p=pair, e=everything: scan(p, e, (PAPER,)), 3)
        note(
            f"scan from the page cache on {device}, over the slower of the two",
            f"{rate / min(read, copy):.2f} ({rate / 1e9:.1f} GB/s)",
            "0.70" if device == GPU else "-",
        )
    if (counted[GPU] != counted["cpu"]).any():
        raise SystemExit("from files the GPU counts other integers than the CPU")


def attempt(what: str, work: Callable[[], object]) -> None:
    """Do one part; what fails is a row of the table, and the others are still measured."""
    print(what, flush=True)
    start = time.perf_counter()
    try:
        work()
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        note(what, f"FAILED: {str(error).splitlines()[0] if str(error) else error!r}")
    torch.cuda.empty_cache()
    print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all")
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device to measure on")
    entries = 1 << (26 if options.quick else 32)
    attempt("kernels agree", check_kernels)
    attempt("other dtypes agree", check_other_dtypes)
    attempt("in GPU memory", lambda: measure_in_memory(entries))
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        attempt("from files", lambda: measure_from_files(Path(scratch), entries))
    attempt("rank", lambda: measure_rank(options.quick))
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}, numpy {np.__version__}"
    today = datetime.now(UTC).date()
    print(f"\n{torch.cuda.get_device_name(0)}, {today}; {versions}\n")
    print("| what | measured | must reach |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
