"""`train_inside`: only the entries of a mask are trained, the others stay the same to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet import SubnetError, UpdateMask, train_inside

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
    "Adam L2": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.5),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, weight_decay=0.1),
}


def a_model(seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)
        ).to(dtype)


def a_mask(model, density=0.3, seed=0, names=None):
    draw = np.random.default_rng(seed)
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    return UpdateMask.of(
        {name: draw.random(shapes[name]) < density for name in names or ("0.weight", "2.bias")}
    )


def a_loss(model, number=0):
    dtype = next(model.parameters()).dtype
    inputs = torch.linspace(-1, 1, 20, dtype=dtype).reshape(4, 5) * (number + 1)
    return model(inputs).float().square().mean()


def copied(model):
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def words(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


def changed(before, tensor):
    itemsize = tensor.element_size()
    return (
        (words(before).reshape(-1, itemsize) != words(tensor).reshape(-1, itemsize))
        .any(1)
        .reshape(tensor.shape)
    )


def inside(mask, name, tensor):
    if name not in mask.names():
        return torch.zeros(tensor.shape, dtype=torch.bool)
    return torch.from_numpy(mask[name])


def outside_is_the_same(model, before, mask):
    return all(
        not (changed(before[name], each) & ~inside(mask, name, each)).any()
        for name, each in model.named_parameters()
    )


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_it_does_what_masking_and_restoring_by_hand_does(make):
    by_hand, model = a_model(), a_model()
    mask = a_mask(model)
    other = make(by_hand.parameters())
    for number in range(4):
        before = copied(by_hand)
        a_loss(by_hand, number).backward()
        for name, each in by_hand.named_parameters():
            each.grad *= inside(mask, name, each)
        other.step()
        with torch.no_grad():
            for name, each in by_hand.named_parameters():
                each.copy_(torch.where(inside(mask, name, each), each, before[name]))
        other.zero_grad()

    start, optimizer = copied(model), make(model.parameters())
    with train_inside(model, optimizer, mask) as training:
        for number in range(4):
            a_loss(model, number).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert training.steps == 4
    assert training.entries == mask.count
    assert outside_is_the_same(model, start, mask)
    assert changed(start["0.weight"], model[0].weight).sum() == mask.info("0.weight").entries
    for left, right in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(sorted(OPTIMIZERS)),
    st.integers(0, 2**31),
    st.floats(0, 1),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 2),
)
def test_entries_outside_are_the_same_after_any_steps(name, seed, density, steps, dtype, warm):
    model = a_model(seed % 97, dtype)
    mask = a_mask(model, density, seed) | UpdateMask.of(
        {"0.weight": np.eye(9, 5, dtype=bool), "2.bias": np.zeros(3, bool)}
    )
    optimizer = OPTIMIZERS[name](model.parameters())
    for number in range(warm):  # momentum from before the block
        a_loss(model, number).backward()
        optimizer.step()
    with torch.no_grad():
        model[0].weight[-1] = torch.tensor([-0.0, 0.0, torch.nan, torch.inf, 1e-38])
        model[2].weight[0, 0] = -0.0
    before = copied(model)
    with train_inside(model, optimizer, mask):
        for number in range(steps):
            a_loss(model, number).backward()
            optimizer.step()
    assert outside_is_the_same(model, before, mask)


@pytest.mark.parametrize("decay", [0.01, 0.0], ids=["weight decay", "none"])
@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_masked_gradients_alone_leak_by_weight_decay_and_only_by_it(name, decay):
    model = a_model()
    mask, before = a_mask(model), copied(model)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, weight_decay=decay)
    with train_inside(model, optimizer, mask, gradients_only=True) as training:
        for number in range(3):
            a_loss(model, number).backward()
            optimizer.step()
    assert outside_is_the_same(model, before, mask) == (decay == 0)
    assert training.kept_bytes == 0
    moved = changed(before["2.weight"], model[2].weight)
    assert moved.all() if decay else not moved.any()


@pytest.mark.parametrize("gradients_only", [False, True])
def test_momentum_from_before_moves_only_where_gradients_alone_are_masked(gradients_only):
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    a_loss(model).backward()
    optimizer.step()
    mask, before = a_mask(model), copied(model)
    with train_inside(model, optimizer, mask, gradients_only=gradients_only):
        optimizer.zero_grad()
        a_loss(model).backward()
        optimizer.step()
    assert outside_is_the_same(model, before, mask) == (not gradients_only)


def test_accumulated_gradients_are_masked_once_right_before_the_step():
    model, accumulated = a_model(), a_model()
    mask = a_mask(model)
    for each, batches in ((model, 1), (accumulated, 4)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        with train_inside(each, optimizer, mask) as training:
            for _ in range(batches):
                (a_loss(each) / batches).backward()
            assert each[0].weight.grad.all()  # what a clipped norm is taken of
            optimizer.step()
        assert not each[0].weight.grad[~torch.from_numpy(mask["0.weight"])].any()
        assert not each[2].weight.grad.any()
        assert training.steps == 1
    torch.testing.assert_close(model.state_dict(), accumulated.state_dict())


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_closures_are_masked_whenever_they_run(search):
    model = a_model()
    mask = a_mask(model)
    with torch.no_grad():
        model[2].weight.fill_(-0.0)
        model[2].weight[0] = 1
    before = copied(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn=search)

    def closure():
        optimizer.zero_grad()
        loss = a_loss(model)
        loss.backward()
        return loss

    start = closure().item()
    with train_inside(model, optimizer, mask):
        optimizer.step(closure=closure)
        loss = optimizer.step(closure)
    assert outside_is_the_same(model, before, mask)
    assert loss < start


def test_the_gradients_that_a_closure_computes_are_masked():
    model = a_model()
    mask, before = a_mask(model), copied(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = a_loss(model)
        loss.backward()
        return loss

    with train_inside(model, optimizer, mask, gradients_only=True):
        optimizer.step(closure)
    assert outside_is_the_same(model, before, mask)
    assert changed(before["0.weight"], model[0].weight).any()


def test_a_closure_of_adamw_is_masked_too():
    model = a_model()
    mask, before = a_mask(model), copied(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)

    def closure():
        loss = a_loss(model)
        loss.backward()
        return loss

    with train_inside(model, optimizer, mask):
        assert optimizer.step(closure) > 0  # no gradient is there before it
    assert outside_is_the_same(model, before, mask)
    assert changed(before["0.weight"], model[0].weight).any()


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_unscales_before_or_in_the_step(fused):
    scaled, plain = a_model(), a_model()
    mask, before = a_mask(scaled), copied(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for model in (scaled, plain):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        with train_inside(model, optimizer, mask):
            loss = a_loss(model)
            if model is scaled:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
    assert outside_is_the_same(scaled, before, mask)
    torch.testing.assert_close(scaled.state_dict(), plain.state_dict())


@pytest.mark.parametrize("gradients_only", [False, True])
def test_inf_in_a_gradient_outside_does_no_harm(gradients_only):
    model = a_model()
    mask = a_mask(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with train_inside(model, optimizer, mask, gradients_only=gradients_only):
        a_loss(model).backward()
        model[0].weight.grad[~torch.from_numpy(mask["0.weight"])] = torch.inf
        model[2].weight.grad.fill_(torch.nan)
        optimizer.step()
    assert all(each.isfinite().all() for each in model.parameters())


def test_float32_masters_of_a_bfloat16_model_are_given_by_name():
    model = a_model(dtype=torch.bfloat16)
    mask, before = a_mask(model), copied(model)
    masters = {name: each.detach().float() for name, each in model.named_parameters()}
    start = {name: each.clone() for name, each in masters.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-2, weight_decay=0.5)
    with train_inside(masters, optimizer, mask) as training:
        for number in range(3):
            a_loss(model, number).backward()
            with torch.no_grad():
                for name, each in model.named_parameters():
                    masters[name].grad = each.grad.float()
                optimizer.step()
                for name, each in model.named_parameters():
                    each.copy_(masters[name])
                    each.grad = None
    assert training.entries == mask.count
    assert outside_is_the_same(model, before, mask)
    for name, master in masters.items():
        moved = changed(start[name], master)
        assert torch.equal(moved, inside(mask, name, master))


def test_autocast_on_a_float32_model():
    model = a_model()
    mask, before = a_mask(model), copied(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with train_inside(model, optimizer, mask):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = a_loss(model)
        loss.backward()
        optimizer.step()
    assert outside_is_the_same(model, before, mask)
    assert changed(before["0.weight"], model[0].weight).any()


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.mark.parametrize(
    "names", [["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]]
)
def test_tied_weights_are_one_parameter_under_any_of_their_names(names):
    model = Tied()
    entries = np.arange(24).reshape(6, 4) % 3 == 0
    mask = UpdateMask.of(dict.fromkeys(names, entries))
    before = model.embed.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with train_inside(model, optimizer, mask) as training:
        model(torch.arange(6)).square().sum().backward()
        optimizer.step()
    assert training.entries == 8
    assert torch.equal(changed(before, model.embed.weight), torch.from_numpy(entries))


def test_a_tied_weight_that_lies_inside_whole_is_trained_whole():
    model = Tied()
    before = model.embed.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with train_inside(model, optimizer, UpdateMask.of({"embed.weight": np.ones((6, 4), bool)})):
        model(torch.arange(6)).square().sum().backward()
        optimizer.step()
    assert changed(before, model.embed.weight).all()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from importing dynamo
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(torch.compile, marks=pytest.mark.slow),
        torch.nn.DataParallel,
        lambda model: torch.nn.ModuleDict({"model": model}),
    ],
    ids=["compile", "data parallel", "a longer name"],
)
def test_wrapped_models_are_known_by_the_names_of_the_bare_one(wrap):
    model = a_model()
    mask, before = a_mask(model), copied(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with train_inside(wrap(model), optimizer, mask):
        a_loss(model).backward()
        optimizer.step()
    assert outside_is_the_same(model, before, mask)
    assert changed(before["0.weight"], model[0].weight).any()


def test_weights_that_do_not_lie_in_row_order():
    model = torch.nn.Linear(5, 9)
    model.weight = torch.nn.Parameter(model.weight.detach().t().contiguous().t())
    mask = UpdateMask.of({"weight": np.arange(45).reshape(9, 5) % 2 == 0})
    before = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    with train_inside(model, optimizer, mask):
        model(torch.ones(1, 5)).sum().backward()
        optimizer.step()
    assert torch.equal(before != model.weight, torch.from_numpy(mask["weight"]))


def test_what_the_optimiser_owns_besides_the_model_is_left_alone():
    model, critic = a_model(), torch.nn.Linear(3, 1)
    before = critic.weight.detach().clone()
    optimizer = torch.optim.SGD([*model.parameters(), *critic.parameters()], lr=0.1)
    with train_inside(model, optimizer, a_mask(model)):
        critic(model(torch.ones(1, 5))).sum().backward()
        optimizer.step()
    assert (critic.weight != before).all()


def test_buffers_move_on():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    mask = UpdateMask.of({"0.weight": np.eye(3, dtype=bool)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with train_inside(model, optimizer, mask):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("how", ["at its end", "by an exception", "by an exception in the step"])
def test_the_optimiser_is_as_it_was_after_the_block(how):
    model, free = a_model(), a_model()
    mask, before = a_mask(model), copied(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    gradient = None

    def fails():
        a_loss(model).backward()
        with torch.no_grad():
            model[0].weight += 1
            model[2].weight += 1
        raise KeyError("broken")

    try:
        with train_inside(model, optimizer, mask):
            a_loss(model).backward()
            gradient = model[2].weight.grad
            if how == "by an exception":
                raise KeyError("broken")
            if how == "by an exception in the step":
                optimizer.step(fails)
    except KeyError:
        assert how != "at its end"
    assert outside_is_the_same(model, before, mask)
    if "step" not in how:  # in which the closure made new ones
        assert model[2].weight.grad is gradient
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    model.load_state_dict(free.state_dict())
    optimizer.zero_grad()
    other = torch.optim.SGD(free.parameters(), lr=0.1, weight_decay=0.1)
    for each, its in ((model, optimizer), (free, other)):
        a_loss(each).backward()
        its.step()
    torch.testing.assert_close(model.state_dict(), free.state_dict(), rtol=0, atol=0)


class Breaks(torch.optim.AdamW):
    """Moves everything by hand, and raises, where it is told to."""

    broken = None

    def step(self, closure=None):
        loss = super().step(closure)
        if self.broken is not None:
            with torch.no_grad():
                for each in self.param_groups[0]["params"]:
                    each += 1
            raise self.broken
        return loss


@pytest.mark.parametrize("error", [KeyError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("scheduled", ["never", "before", "in the block"])
def test_after_a_step_that_raised_the_next_is_a_step_like_any_other(error, scheduled):
    model, other = a_model(), a_model(seed=1)
    mask, before = a_mask(model), copied(model)
    optimizer = Breaks(model.parameters(), lr=0.1, weight_decay=0.5)

    def schedule():
        return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)

    scheduler = schedule() if scheduled == "before" else None
    with train_inside(model, optimizer, mask) as training:
        if scheduled == "in the block":
            scheduler = schedule()
        for rolled_back in (before, copied(other)):
            a_loss(model).backward()
            gradient = model[2].weight.grad
            optimizer.broken = error
            with pytest.raises(type(error)):
                optimizer.step()
            optimizer.broken = None
            assert outside_is_the_same(model, before, mask)
            assert not training._kept
            assert model[2].weight.grad is gradient
            model.load_state_dict(rolled_back)
            before = rolled_back
            for number in range(2):
                a_loss(model, number).backward()
                optimizer.step()
                assert outside_is_the_same(model, before, mask)
            assert model[2].weight.grad is gradient
            optimizer.zero_grad()
        assert training.steps == 4
        if scheduler is not None:
            scheduler.step()
    assert outside_is_the_same(model, before, mask)
    assert changed(before["0.weight"], model[0].weight).any()
    optimizer.broken = error  # outside of the block nothing is put back
    with pytest.raises(type(error)):
        optimizer.step()
    assert not outside_is_the_same(model, before, mask)
    assert ("step" in vars(optimizer)) == (scheduled != "never")


def test_a_caught_sparse_gradient_holds_nothing():
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(4, 4), "b": torch.nn.Embedding(4, 4, sparse=True)}
    )
    mask = UpdateMask.of({"a.weight": np.eye(4, dtype=bool), "b.weight": np.eye(4, dtype=bool)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with train_inside(model, optimizer, mask) as training:
        model["a"](model["b"](torch.tensor([1]))).sum().backward()
        gradient = model["a"].bias.grad
        with pytest.raises(SubnetError, match="is sparse"):
            optimizer.step()
        assert model["a"].bias.grad is gradient
        assert not training._kept
        model["b"].weight.grad = None
        with torch.no_grad():
            model["a"].weight += 1
        before = model["a"].weight.detach().clone()
        optimizer.step()
        assert training.steps == 1
    assert torch.equal(changed(before, model["a"].weight), torch.eye(4, dtype=torch.bool))


@pytest.mark.parametrize("write", [lambda p: p.mul_(0.9), lambda p: p.data.mul_(0.9)])
def test_an_optimiser_that_moves_what_has_no_gradient(write):
    class Decays(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for each in group["params"]:
                    write(each)

    model = a_model()
    mask, before = a_mask(model), copied(model)
    optimizer = Decays(model.parameters(), {})
    with train_inside(model, optimizer, mask) as training:
        optimizer.step()
        a_loss(model).backward()
        optimizer.step()
    assert outside_is_the_same(model, before, mask)
    assert changed(before["0.weight"], model[0].weight).sum() == mask.info("0.weight").entries
    assert training.kept_bytes == 4 * (sum(each.numel() for each in before.values()) - mask.count)


def test_a_step_that_calls_its_parents_step_is_one_step():
    class Decaying(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for each in self.param_groups[0]["params"]:
                    if each.grad is not None:
                        each -= 0.5

    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # torch hooks its step now
    model = a_model()
    mask, before = a_mask(model), copied(model)
    optimizer = Decaying(model.parameters(), lr=0.1)
    with train_inside(model, optimizer, mask) as training:
        for _ in range(2):
            a_loss(model).backward()
            optimizer.step()
    assert training.steps == 2
    assert outside_is_the_same(model, before, mask)


def test_two_blocks_train_what_is_in_both_masks():
    model = a_model()
    one, other = a_mask(model, 0.5, 1), a_mask(model, 0.5, 2)
    before = copied(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    with train_inside(model, optimizer, one), train_inside(model, optimizer, other):
        a_loss(model).backward()
        optimizer.step()
    assert outside_is_the_same(model, before, one & other)


def test_it_keeps_one_bit_an_entry_and_in_a_step_the_entries_outside():
    model = a_model()
    mask = UpdateMask.of(
        {
            "0.weight": np.arange(45).reshape(9, 5) % 3 == 0,  # 30 of 45 outside
            "0.bias": np.ones(9, bool),  # whole inside: no mask, nothing to keep
            "2.bias": np.zeros(3, bool),  # whole outside: passed over, nothing to keep
        }
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with train_inside(model, optimizer, mask) as training:
        assert training.mask_bytes == 8
        assert training.kept_bytes == 0
        a_loss(model).backward()
        optimizer.step()
        assert training.kept_bytes == 30 * 4
        assert not training._kept
    assert repr(training) == ("<InsideTraining 24 entries, 1 step, mask 8 B, kept 120 B in a step>")
