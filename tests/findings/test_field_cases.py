"""What went wrong in the field, planted with real optimisers and caught from real files."""

import copy

import pytest
import torch

from pytest_subnet import (
    PairMismatchError,
    assert_finite,
    assert_frozen,
    assert_max_change,
    assert_same_structure,
    assert_update_sparsity,
    assert_updated,
    open_pair,
    record_update,
    update_sparsity,
)

STEPS = 100


def state(model, dtype=None):
    return {
        name: tensor.detach().to(dtype or tensor.dtype, copy=True)
        for name, tensor in model.state_dict().items()
    }


def train_768_ones(*, masters):
    """768 bfloat16 weights at 1.0, trained by Adam at lr 6e-4 for 100 steps."""
    weight = torch.nn.Parameter(torch.ones(768, dtype=torch.float32 if masters else torch.bfloat16))
    optimizer = torch.optim.Adam([weight], lr=6e-4)
    direction = torch.randn(768, generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):
        optimizer.zero_grad()
        (weight.float() * direction).sum().backward()
        optimizer.step()
    return {"model.norm.weight": weight.detach().bfloat16()}


def test_bfloat16_without_masters_stays_at_one(pair_of, fails_with):
    ones = {"model.norm.weight": torch.ones(768, dtype=torch.bfloat16)}
    pair = pair_of(ones, train_768_ones(masters=False))
    with fails_with("""
        1 of 1 tensor did not move
          pair       base -> tuned   (same bits, bf16, 1/1 tensor, 768 entries)
          updated    0 / 768   in 0 of 1 tensor
          worst      model.norm.weight  0 / 768  (bf16[768])
          resolution bf16 stores no step below 0.002 at |w| = 1 (rms) without float32 masters
                     a step can move, of these, 0.00% at 1e-06, 0.00% at 1e-05, 0.00% at 1e-04
          usually    no gradient reaches them (a LoRA A while its B is zero), the optimiser does not
                     own them, or each step is smaller than the storage dtype resolves
          to accept  leave the tensors out with exclude=
    """):
        assert_updated(pair, "*norm*")
    with pytest.raises(AssertionError, match=r"\Anothing moved"):
        assert_update_sparsity(pair, at_least=0.7)


def test_the_same_steps_on_float32_masters_move_every_weight(pair_of):
    ones = {"model.norm.weight": torch.ones(768, dtype=torch.bfloat16)}
    pair = pair_of(ones, train_768_ones(masters=True))
    assert assert_updated(pair, "*norm*", at_least=1).updated == 768


@pytest.mark.parametrize("lr", [1e-6, 1e-5, 2e-5])
def test_one_adam_step_shows_on_the_weights_whose_half_ulp_is_below_its_rate(pair_of, lr):
    generator = torch.Generator().manual_seed(1)
    stored = (torch.randn(512, 512, generator=generator) * 0.02).bfloat16()
    weight = torch.nn.Parameter(stored.float())
    weight.grad = torch.randn(512, 512, generator=generator)
    torch.optim.AdamW([weight], lr=lr, weight_decay=0).step()
    pair = pair_of({"w.weight": stored}, {"w.weight": weight.detach().bfloat16()})
    half_ulp = 2.0 ** (stored.double().abs().log2().floor() - 8)
    predicted = float((half_ulp < lr).double().mean())
    assert update_sparsity(pair).density == pytest.approx(predicted, rel=0.03)


def masked_training(optimizer_class, *, steps_before=0, grad_is_none=False, **options):
    """Five steps in which the gradient of `frozen` is taken away; what it was, what it is."""
    torch.manual_seed(2)
    model = torch.nn.ModuleDict({"frozen": torch.nn.Linear(8, 8), "trained": torch.nn.Linear(8, 8)})
    optimizer = optimizer_class(model.parameters(), lr=0.01, **options)
    before = state(model)
    for step in range(steps_before + 5):
        if step == steps_before:
            before = state(model)
        optimizer.zero_grad()
        model.trained(model.frozen(torch.ones(1, 8))).square().sum().backward()
        if step >= steps_before:
            for parameter in model.frozen.parameters():
                parameter.grad = None if grad_is_none else torch.zeros_like(parameter)
        optimizer.step()
    return before, state(model)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.01}),
        (torch.optim.Adam, {"weight_decay": 0.01}),
        (torch.optim.SGD, {"weight_decay": 0.01}),
        (torch.optim.AdamW, {"weight_decay": 0.0, "steps_before": 3}),
        (torch.optim.SGD, {"momentum": 0.9, "steps_before": 3}),
    ],
)
def test_decay_and_old_momentum_move_what_a_mask_should_freeze(pair_of, optimizer, options):
    pair = pair_of(*masked_training(optimizer, **options))
    with pytest.raises(AssertionError) as caught:
        assert_frozen(pair, "frozen.*")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("2 of 2 frozen tensors moved by up to ")
    assert lines[2] == "  updated    72 / 72"
    assert lines[-3].startswith("  usually    weight decay on zero gradients, optimiser state from")
    assert_updated(pair, "trained.*")


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.0}),
        (torch.optim.SGD, {"steps_before": 3}),
        (torch.optim.AdamW, {"weight_decay": 0.01, "grad_is_none": True}),
    ],
)
def test_without_decay_or_without_a_gradient_it_stays_frozen(pair_of, optimizer, options):
    pair = pair_of(*masked_training(optimizer, **options))
    assert assert_frozen(pair, "frozen.*").numel == 72
    assert_updated(pair, "trained.*")


def test_a_part_the_optimizer_does_not_own_is_named(pair_of):
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    before = state(model)
    model(torch.ones(1, 4)).sum().backward()
    torch.optim.AdamW(model[1].parameters(), lr=0.1).step()
    pair = pair_of(before, state(model))
    with pytest.raises(AssertionError) as caught:
        assert_updated(pair, "*")
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 of 4 tensors did not move"
    assert {lines[3].split()[1], lines[4].split()[0]} == {"0.bias", "0.weight"}


class LoRALinear(torch.nn.Module):
    """A linear layer with an adapter; B starts at zero, as everywhere."""

    def __init__(self, *, gradient=True):
        super().__init__()
        self.gradient = gradient
        self.base_layer = torch.nn.Linear(8, 8).requires_grad_(False)
        self.lora_A = torch.nn.Linear(8, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, 8, bias=False)
        torch.nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        adapter = self.lora_B(self.lora_A(x))
        return self.base_layer(x) + (adapter if self.gradient else adapter.detach())

    def merged(self):
        merged = self.base_layer.weight + self.lora_B.weight @ self.lora_A.weight
        return {"weight": merged.detach(), "bias": self.base_layer.bias.detach()}


def train_adapter(model, steps=2):
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        output = model(torch.full((1, 8), 1.0 + step, requires_grad=True))
        output.square().sum().backward()
        optimizer.step()


def test_adapter_training_moves_the_adapters_and_nothing_else():
    torch.manual_seed(4)
    model = torch.nn.Sequential(LoRALinear(), LoRALinear())
    with record_update(model) as update:
        train_adapter(model)
    assert assert_updated(update, "*lora_B*", at_least=1).moved == 2
    assert assert_frozen(update, "*.base_layer.*").numel == 2 * 72


def test_an_adapter_whose_gradient_is_blocked_keeps_b_at_zero(pair_of):
    torch.manual_seed(4)
    model = LoRALinear(gradient=False)
    before, base = state(model), state(model.base_layer)
    train_adapter(model)
    assert torch.count_nonzero(model.lora_B.weight) == 0
    with pytest.raises(AssertionError, match=r"\A1 of 1 tensor did not move\n"):
        assert_updated(pair_of(before, state(model)), "*lora_B*")
    with pytest.raises(AssertionError, match=r"\Anothing moved"):
        assert_update_sparsity(pair_of(base, model.merged()), at_least=0)


def test_a_merged_adapter_moved_the_weight_and_not_the_bias(pair_of):
    torch.manual_seed(4)
    model = LoRALinear()
    base = state(model.base_layer)
    train_adapter(model)
    pair = pair_of(base, model.merged())
    assert_updated(pair, "weight", at_least=0.9)
    assert_frozen(pair, "bias")


def test_a_base_that_was_saved_again_moved_nothing(pair_of):
    model = torch.nn.Linear(8, 8)
    pair = pair_of(state(model), state(model))
    assert_same_structure(pair)
    with pytest.raises(AssertionError, match=r"\Anothing moved: base and tuned hold the same"):
        assert_update_sparsity(pair, at_least=0.7)
    with pytest.raises(AssertionError, match=r"\A2 of 2 tensors did not move"):
        assert_updated(pair, "*")


def test_a_checkpoint_passed_through_half_precision_lost_its_small_values(pair_of):
    words = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = words[words.isfinite()]
    moderate = finite[finite.abs() < 65536]
    pair = pair_of({"w.weight": moderate}, {"w.weight": moderate.half().bfloat16()})
    with pytest.raises(AssertionError, match=r"\A1 of 1 frozen tensor moved by up to 2\.98e-08\n"):
        assert_frozen(pair, "*")
    result = update_sparsity(pair)
    small = moderate.abs() < 2**-17
    lost = int((moderate[small] != moderate[small].half().bfloat16()).sum())
    assert result.updated - result.zero_sign_flips == lost
    assert result.nonfinite == 0
    large = moderate[~small]
    assert_frozen(pair_of({"w.weight": large}, {"w.weight": large.half().bfloat16()}), "*")


def test_half_precision_turns_large_values_infinite(pair_of):
    base = {"w.weight": torch.tensor([1.0, 65280.0, 65536.0], dtype=torch.bfloat16)}
    with pytest.raises(AssertionError, match=r"\A1 NaN or Inf in tuned, 0 in base"):
        assert_finite(pair_of(base, {"w.weight": base["w.weight"].half().bfloat16()}))


def test_a_run_saved_in_another_dtype_is_not_compared_silently(pair_of):
    stored = {"w.weight": (torch.arange(64.0) / 64).bfloat16()}
    saved = {"w.weight": stored["w.weight"].float()}
    with pytest.raises(PairMismatchError, match=r"retyped +w\.weight"):
        assert_update_sparsity(pair_of(stored, saved), at_least=0.5)
    assert_frozen(pair_of(stored, saved, as_dtype="bfloat16"), "*")


def test_steps_that_float32_keeps_vanish_in_the_dtype_that_is_served(pair_of):
    generator = torch.Generator().manual_seed(5)
    base = {"w.weight": torch.randn(128, 128, generator=generator) * 0.02}
    tuned = {"w.weight": base["w.weight"] * (1 + 2e-7)}
    assert assert_update_sparsity(pair_of(base, tuned), at_most=0.01).sparsity < 0.01
    served = pair_of(base, tuned, as_dtype="bfloat16")
    assert assert_update_sparsity(served, at_least=0.99, allow_identical=True).sparsity > 0.99


def test_a_run_that_diverged_is_not_finite_and_has_no_distance(pair_of):
    model = torch.nn.Linear(4, 4)
    before = state(model)
    for _ in range(3):
        model.zero_grad()
        model(torch.full((1, 4), 1e20)).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=1e10).step()
    pair = pair_of(before, state(model))
    with pytest.raises(AssertionError, match=r"\A20 NaN or Inf in tuned, 0 in base"):
        assert_finite(pair)
    with pytest.raises(AssertionError, match=r"\A20 NaN or Inf in tuned, 0 in base"):
        assert_max_change(pair, at_most=1)
    with pytest.raises(AssertionError, match=r"\A2 of 2 tensors did not move"):
        assert_updated(pair, "*")


def test_tensors_swapped_within_a_checkpoint_moved_too_far(pair_of):
    torch.manual_seed(6)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in ("q_proj", "k_proj")})
    swapped = copy.deepcopy(model)
    swapped["q_proj"], swapped["k_proj"] = swapped["k_proj"], swapped["q_proj"]
    pair = pair_of(state(model), state(swapped))
    assert_same_structure(pair)
    with pytest.raises(AssertionError, match=r"\Arelative change 1\.\d+ is above the allowed 0\.5"):
        assert_max_change(pair, at_most=0.5, relative=True)


def test_a_resumed_run_without_steps_changed_nothing(save):
    torch.manual_seed(7)
    model = torch.nn.Linear(8, 8).bfloat16()
    base = save(state(model), "base")
    resumed = torch.nn.Linear(8, 8).bfloat16()
    resumed.load_state_dict(state(model))
    tuned = save(state(resumed), "tuned")
    assert assert_frozen(open_pair(base, tuned), "*").updated == 0
