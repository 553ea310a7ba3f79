"""A language model of 0.15 million parameters that has learnt some Python, trained in seconds."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"

# ChatML; what the assistant says is marked, for a loss on that alone.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides how the model comes out; another value makes another laboratory."""

    vocab_size: int = 512
    hidden_size: int = 64
    intermediate_size: int = 172
    layers: int = 2
    heads: int = 4
    key_value_heads: int = 2
    initializer_range: float = 0.06
    context: int = 256
    steps: int = 200
    batch_size: int = 4
    window: int = 128
    learning_rate: float = 1e-2
    max_grad_norm: float = 1.0
    seed: int = 0


def train_tokenizer(texts: Sequence[str], *, settings: Settings) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any text, and give it a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast  # transformers leaves its arguments untyped
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained: PreTrainedTokenizerFast = fast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=settings.context,
    )
    return trained


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The texts as one row of token ids, with an end after each."""
    import torch

    encoded = tokenizer(list(texts), verbose=False)["input_ids"]
    return torch.tensor([each for ids in encoded for each in (*ids, tokenizer.eos_token_id)])


def train_model(tokens: torch.Tensor, *, settings: Settings) -> LlamaForCausalLM:
    """Train a Llama from scratch, in float32, on random windows of a row of token ids."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        initializer_range=settings.initializer_range,
        max_position_embeddings=settings.context,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    windows = tokens.unfold(0, settings.window, 1)
    with _the_same_everywhere(settings.seed):
        model: Any = LlamaForCausalLM(config)
        model = model.float().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
        )
        for _ in range(settings.steps):
            batch = windows[torch.randint(len(windows), (settings.batch_size,))]
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    trained: LlamaForCausalLM = model.eval()
    return trained


def loss_on(model: LlamaForCausalLM, tokens: torch.Tensor, *, settings: Settings) -> float:
    """The mean of -log p over the tokens of up to 100 windows that do not overlap, in nats."""
    import torch

    windows = tokens.unfold(0, settings.window, settings.window)[:100]
    with torch.no_grad(), _the_same_everywhere(settings.seed):
        return float(model(input_ids=windows, labels=windows).loss)


@contextmanager
def _the_same_everywhere(seed: int) -> Iterator[None]:
    """What torch works with, apart from how the caller set it, who has it as before, then."""
    import torch

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)  # sums over several come out otherwise in their last bits
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


@contextmanager
def without_progress() -> Iterator[None]:
    """A model this small needs no bar to load or save; what the caller chose is as before, then."""
    from transformers import utils

    logging: Any = utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
