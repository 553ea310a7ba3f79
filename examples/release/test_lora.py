"""What a trainer's own unit test can assert: the adapter learns and the base stays as it was.

The model comes from `python examples/release/tune.py .demo`; the training takes seconds.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from pytest_subnet import ModelPair, assert_frozen, assert_updated

# PEFT 0.21 still asks for a property that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def trainer(pytestconfig: pytest.Config, tmp_path: Path) -> SFTTrainer:
    """Return a trainer that adapts the demo's base to two sentences, for two steps."""
    base = pytestconfig.rootpath / ".demo" / "base"
    assert base.is_dir(), "run `python examples/release/tune.py .demo` first"
    sentences = ["Simple is better than complex.", "Readability counts."]
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(base),
        args=SFTConfig(
            output_dir=str(tmp_path),
            learning_rate=1e-3,
            max_steps=2,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"text": sentence} for sentence in sentences]),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def test_lora_trains_the_adapter_only(
    trainer: SFTTrainer, record_update: Callable[..., AbstractContextManager[ModelPair]]
) -> None:
    """Train for real, then look at what moved: all of the adapter, nothing below it."""
    with record_update(trainer.model) as update:
        trainer.train()

    # The adapter adds B @ A, and B starts at zero: as long as B does not move, nothing is learned.
    assert_updated(update, "*lora_B*")
    assert_frozen(update, "*.base_layer.*")
