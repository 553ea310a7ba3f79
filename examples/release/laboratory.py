"""Train a small base in two to three minutes, so that the release gate can compare something.

    python examples/release/laboratory.py .demo

writes `.demo/base`: a Llama of 3.95 million parameters and its tokenizer, trained on the source of
the running interpreter's standard library and stored in bfloat16, as models are published. Nothing
is downloaded. A second call with the same settings finds the finished model and returns.
"""

import argparse
import hashlib
import json
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RECORD = "laboratory.json"
PAD, EOS = "<pad>", "<eos>"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides how the base comes out; another value trains another base."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 688
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    context: int = 128
    steps: int = 250
    batch_size: int = 8
    learning_rate: float = 1e-3
    max_grad_norm: float = 1.0
    seed: int = 0


def read_standard_library() -> list[str]:
    """Return the source of the standard library's top-level modules, in alphabetical order.

    Modules with a leading underscore are left out: one of them, `_sysconfigdata_*`, holds the paths
    of the machine that built the interpreter.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("[a-z]*.py"))]


def build_base(out: Path, *, settings: Settings | None = None) -> Path:
    """Train the base into `out / "base"`, unless it is there already, and return that folder."""
    settings = settings or Settings()
    corpus = read_standard_library()
    record = {
        "settings": asdict(settings),
        "corpus_sha256": hashlib.sha256("".join(corpus).encode()).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }

    def train(folder: Path) -> None:
        tokenizer = train_tokenizer(corpus, vocab_size=settings.vocab_size)
        model = train_model(encode(corpus, tokenizer=tokenizer), settings=settings)
        # The run is over: storing bfloat16 here is what hides small updates from a comparison.
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return build_once(out / "base", record=record, build=train)


def build_once(folder: Path, *, record: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """Let `build` fill `folder`, unless an earlier call with an equal `record` already did.

    `build` works in a scratch folder that takes its final name in one rename, after the record was
    written: whoever finds the record finds the whole model, however the run before it ended.
    """
    if is_built(folder, record=record):
        print(f"{folder}: up to date")
        return folder

    start = time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch, "fresh")
        fresh.mkdir()
        build(fresh)
        (fresh / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(Path(scratch, "stale"))
        fresh.rename(folder)
    print(f"{folder}: built in {time.perf_counter() - start:.0f} s")
    return folder


def is_built(folder: Path, *, record: Mapping[str, Any]) -> bool:
    """Say whether `folder` holds a finished model that was built from an equal record."""
    path = folder / RECORD
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == record


def train_tokenizer(corpus: list[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any text, on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def encode(corpus: list[str], *, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Encode the corpus as one row of token ids, with an end-of-sequence token after each text."""
    texts = [text + EOS for text in corpus]
    return torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids])


def train_model(tokens: torch.Tensor, *, settings: Settings) -> LlamaForCausalLM:
    """Train a Llama from scratch, in float32, on random windows of the row of token ids."""
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.key_value_heads,
            max_position_embeddings=settings.context,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    windows = tokens.unfold(0, settings.context, 1)
    model.train()
    for step in range(1, settings.steps + 1):
        batch = windows[torch.randint(len(windows), (settings.batch_size,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"base: step {step}/{settings.steps}, loss {loss.item():.2f}")
    return model


def main() -> None:
    """Read the command line and build the base."""
    parser = argparse.ArgumentParser(description="Train the base model of the release demo.")
    parser.add_argument("out", type=Path, help="folder that receives base/")
    transformers.logging.disable_progress_bar()
    build_base(parser.parse_args().out)


if __name__ == "__main__":
    main()
