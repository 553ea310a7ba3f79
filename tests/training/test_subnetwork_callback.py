"""`SubnetworkCallback`: a trainer trains only inside a mask."""

from types import SimpleNamespace

import pytest
import torch

from pytest_subnet import SubnetError, SubnetworkCallback, UpdateMask

MASK = UpdateMask.of({"weight": torch.eye(4, dtype=torch.bool)})


@pytest.fixture
def run():
    """What a trainer tells its callbacks: arguments, state, control, and the rest."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    told = SimpleNamespace(fp16=False), SimpleNamespace(global_step=0), SimpleNamespace()
    return told, {"model": model, "optimizer": optimizer}


def step(told, parts):
    parts["model"](torch.ones(1, 4)).sum().backward()
    parts["optimizer"].step()
    told[1].global_step += 1


@pytest.mark.parametrize("gradients_only", [False, True])
def test_only_entries_of_the_mask_move_until_training_ends(run, gradients_only):
    told, parts = run
    before = parts["model"].weight.detach().clone()
    callback = SubnetworkCallback(MASK, gradients_only=gradients_only)
    assert callback.inside is None
    callback.on_train_begin(*told, **parts)
    step(told, parts)
    callback.on_step_end(*told, **parts)
    callback.on_train_end(*told, **parts)
    moved = before != parts["model"].weight
    assert torch.equal(moved, torch.eye(4) > 0) == (not gradients_only)  # weight decay
    assert (callback.inside.entries, callback.inside.steps) == (4, 1)
    step(told, parts)
    assert (before != parts["model"].weight).all()


def test_training_again_after_an_exception_gives_the_first_optimiser_back(run):
    told, parts = run
    callback = SubnetworkCallback(MASK)
    callback.on_train_begin(*told, **parts)
    other = torch.optim.SGD(parts["model"].parameters(), lr=0.1)
    callback.on_train_begin(*told, **{**parts, "optimizer": other})
    assert not parts["optimizer"]._optimizer_step_pre_hooks
    assert other._optimizer_step_pre_hooks
    callback.close()
    assert not other._optimizer_step_pre_hooks


def test_steps_that_go_past_the_optimiser_stop_the_run(run):
    told, parts = run
    callback = SubnetworkCallback(MASK)
    callback.on_train_begin(*told, **parts)
    told[1].global_step += 1
    with pytest.raises(SubnetError) as caught:
        callback.on_step_end(*told, **parts)
    assert str(caught.value) == (
        "the trainer took 1 step, none of them by the optimiser that it shows: its engine "
        "(DeepSpeed, FSDP) has one of its own, and nothing was masked; train without it"
    )
    assert not parts["optimizer"]._optimizer_step_pre_hooks


def test_a_scaler_may_leave_out_steps_but_not_all_of_them(run):
    told, parts = run
    told[0].fp16 = True
    callback = SubnetworkCallback(MASK)
    callback.on_train_begin(*told, **parts)
    told[1].global_step += 2
    callback.on_step_end(*told, **parts)
    with pytest.raises(SubnetError, match="the trainer took 2 steps, none of them"):
        callback.on_train_end(*told, **parts)


def test_a_mask_is_asked_for():
    with pytest.raises(TypeError, match="mask is dict, not an UpdateMask"):
        SubnetworkCallback({})


@pytest.fixture
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
        config = LlamaConfig(**sizes, num_attention_heads=2, vocab_size=32, pad_token_id=0)
        return LlamaForCausalLM(config)


@pytest.fixture
def halves(llama):
    """A mask of about half of each projection."""
    generator = torch.Generator().manual_seed(0)
    return UpdateMask.of(
        {
            name: torch.rand(each.shape, generator=generator) < 0.5
            for name, each in llama.named_parameters()
            if "proj" in name
        }
    )


def only_the_mask_moved(model, before, mask):
    for name, each in model.state_dict().items():
        known = name in mask.names()
        inside = torch.from_numpy(mask[name]) if known else torch.zeros_like(each, dtype=torch.bool)
        moved = each != before[name]
        assert not (moved & ~inside).any(), name
        assert not known or moved.any(), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_real_trainer(llama, halves, tmp_path, accumulated):
    from transformers import Trainer, TrainingArguments

    before = {name: each.clone() for name, each in llama.state_dict().items()}
    callback = SubnetworkCallback(halves)
    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        max_steps=3,
        learning_rate=1e-2,
        weight_decay=0.1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulated,
        disable_tqdm=True,
    )
    ids = torch.arange(128).reshape(16, 8) % 32
    data = [{"input_ids": each, "labels": each} for each in ids]
    Trainer(llama, arguments, train_dataset=data, callbacks=[callback]).train()
    only_the_mask_moved(llama, before, halves)
    assert callback.inside.steps == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_real_trainer_of_trl(llama, halves, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{n}": n + 3 for n in range(29)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    before = {name: each.clone() for name, each in llama.state_dict().items()}
    callback = SubnetworkCallback(halves)
    arguments = trl.SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        max_steps=3,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        per_device_train_batch_size=2,
        disable_tqdm=True,
    )
    data = datasets.Dataset.from_dict({"text": [f"w{n} w{n + 1} w{n + 2}" for n in range(16)]})
    trl.SFTTrainer(
        llama, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[callback]
    ).train()
    only_the_mask_moved(llama, before, halves)
    assert callback.inside.steps == 3
