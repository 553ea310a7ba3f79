"""What if the directions had stayed: losses with the leading ones of the base restored."""

import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pytest_subnet import restore_singular_vectors

sys.path.append(str(Path(__file__).parent))

from noise import MATRICES

CONTEXT, WINDOWS = 128, 64


def restored_table(demo: Path, *, k: int) -> str:
    """Return losses of base and runs, and of the SFT run restored in two ways.

    Once with the `k` leading singular directions of the base in place of its own, once moved as far
    in a straight line towards the base, whatever the directions: the control.
    """
    base = demo / "base"
    windows = {
        name: _windows(base, text) for name, text in (("code", _code()), ("prose", _prose()))
    }
    models = {name: demo / name for name in ("base", "dpo", "grpo", "sft")}
    with TemporaryDirectory() as scratch:
        written = Path(scratch, "restored")
        result = restore_singular_vectors(
            base, demo / "sft", output=written, k_top=k, include=MATRICES
        )
        back = {each.name: each.to_tuned for each in result.per_tensor}
        models[f"sft, {k} directions restored"] = written
        models["sft, as far in a straight line"] = _straight(
            base, demo / "sft", back, Path(scratch, "straight")
        )
        rows = [{"model": name, **_losses(folder, windows)} for name, folder in models.items()]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _code() -> str:
    """Packages of the standard library; the base was trained on its top-level modules alone."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for name in ("email", "json") for path in (library / name).glob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def _prose() -> str:
    """The shorter paragraphs of the language reference; SFT was trained on the longer ones."""
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    return "\n\n".join(each for each in paragraphs if 100 <= len(each) < 300)


def _windows(base: Path, text: str) -> Tensor:
    tokens = torch.tensor(AutoTokenizer.from_pretrained(base)(text)["input_ids"])
    windows = tokens.unfold(0, CONTEXT, CONTEXT)
    return windows[:: max(1, len(windows) // WINDOWS)][:WINDOWS]


@torch.no_grad()
def _losses(folder: Path, windows: dict[str, Tensor]) -> dict[str, str]:
    """Return the mean loss in nats a token, of each kind of text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return {
        name: f"{float(model(input_ids=each, labels=each).loss):.4f}"
        for name, each in windows.items()
    }


def _straight(base: Path, tuned: Path, back: dict[str, float], output: Path) -> Path:
    """Write the tuned model with each matrix moved towards the base by that share of its norm."""
    before, after = (load_file(side / "model.safetensors") for side in (base, tuned))
    for name, share in back.items():
        way = before[name].double() - after[name].double()
        moved = after[name].double() + way * float(share * after[name].double().norm() / way.norm())
        after[name] = moved.to(after[name].dtype)
    output.mkdir()
    for path in tuned.glob("*.json"):
        (output / path.name).write_bytes(path.read_bytes())
    save_file(after, output / "model.safetensors", metadata={"format": "pt"})
    return output
