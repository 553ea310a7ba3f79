"""`Supermasks`: exact densities, straight-through scores, and old tasks that stay to the bit."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet import SubnetError, Supermasks, assert_mask_density
from pytest_subnet.training.supermasks_layers import BestScores, draw_scores, top_k


def network(seed=0, widths=(12, 24, 24, 4)):
    """A network with biases and a norm of its own, which no mask covers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = []
        for before, after in pairwise(widths):
            layers += [torch.nn.Linear(before, after), torch.nn.LayerNorm(after), torch.nn.ReLU()]
        return torch.nn.Sequential(*layers[:-2])


def batches(task, count=6, size=16):
    """Inputs and labels of a task: a linear rule of its own."""
    generator = torch.Generator().manual_seed(task)
    rule = torch.randn(12, 4, generator=generator)
    for _ in range(count):
        inputs = torch.randn(size, 12, generator=generator)
        yield inputs, (inputs @ rule).argmax(1)


def learn(masks, name, task, *, weights=True, optimizer=None):
    """A task as a user learns it; gives how many entries its weights could change."""
    model = masks.model
    with masks.learn_mask(name) as scores:
        of_scores = torch.optim.Adam(scores, lr=0.05)
        train(model, of_scores, task)
    if not weights or not masks.exclusive[name]:
        return 0
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    with masks.learn_weights(name, optimizer) as training:
        train(model, optimizer, task)
    return training.entries


def train(model, optimizer, task):
    for inputs, labels in batches(task):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def outputs(masks, name, inputs):
    with masks.apply(name) as model, torch.no_grad():
        return model(inputs)


def bits(model):
    return {name: each.clone().numpy().tobytes() for name, each in model.state_dict().items()}


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.3, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_old_task_computes_the_same_after_every_new_one(make):
    """One optimiser through all tasks: its momentum would go on in old entries, decay in all."""
    model = network()
    masks = Supermasks(model, density=0.2)
    optimizer = make(model.parameters())
    inputs = torch.randn(32, 12, generator=torch.Generator().manual_seed(99))
    known, start = {}, bits(model)
    for task in range(6):
        assert learn(masks, f"task {task}", task, optimizer=optimizer) > 0
        for name, before in known.items():
            assert torch.equal(outputs(masks, name, inputs), before), name
        known[f"task {task}"] = outputs(masks, f"task {task}", inputs)
    assert len({each.numpy().tobytes() for each in known.values()}) == 6
    moved = {name for name, each in bits(model).items() if each != start[name]}
    assert moved == {"0.weight", "3.weight", "6.weight"}


def test_training_changes_exactly_the_exclusive_entries():
    """Everything else has the bits it had, and nearly every exclusive entry has others."""
    masks = Supermasks(network(), density=0.3)
    for task in range(3):
        before = copy.deepcopy(masks.model.state_dict())
        entries = learn(masks, str(task), task)
        exclusive = masks.exclusive[str(task)]
        assert entries == exclusive.count
        moved = 0
        for name, each in masks.model.state_dict().items():
            differs = (each != before[name]).numpy()
            inside = exclusive[name] if name in exclusive else np.zeros(differs.shape, bool)
            assert not (differs & ~inside).any()
            moved += int(differs.sum())
        assert moved > 0.9 * exclusive.count


def test_a_whole_gradient_would_have_changed_old_tasks():
    """The published default trains all of M_t; the law above does not hold of it."""
    masks = Supermasks(network(), density=0.3)
    learn(masks, "one", 1)
    inputs = torch.randn(8, 12)
    before = outputs(masks, "one", inputs)
    learn(masks, "two", 2, weights=False)
    masks._exclusive["two"] = masks["two"]
    train_all = torch.optim.Adam(masks.model.parameters(), lr=0.02)
    with masks.learn_weights("two", train_all):
        train(masks.model, train_all, 2)
    assert not torch.equal(outputs(masks, "one", inputs), before)


def test_both_are_better_than_the_mask_they_started_from():
    """Scores that are trained lower the loss, and weights lower it further."""

    def loss(name):
        inputs, labels = (torch.cat(each) for each in zip(*batches(1, count=20), strict=True))
        return float(torch.nn.functional.cross_entropy(outputs(masks, name, inputs), labels))

    masks = Supermasks(network(), density=0.3)
    with masks.learn_mask("random"):
        pass
    masks = Supermasks(masks.model, density=0.3)
    with masks.learn_mask("1"):
        pass
    random = loss("1")
    masks = Supermasks(masks.model, density=0.3)
    learn(masks, "1", 1, weights=False)
    found = loss("1")
    optimizer = torch.optim.Adam(masks.model.parameters(), lr=0.02)
    with masks.learn_weights("1", optimizer):
        train(masks.model, optimizer, 1)
    assert loss("1") < found < random


def test_supsup_never_moves_a_weight():
    """Masks alone: the model has the bits it had, through any number of tasks."""
    model = network()
    masks = Supermasks(model, density=0.5, signed=True)
    sizes = model[0].weight.abs().unique()
    assert sizes.tolist() == pytest.approx([math.sqrt(2 / (0.5 * 12))])
    assert 0.3 < float((model[0].weight > 0).float().mean()) < 0.7
    before = bits(model)
    for task in range(3):
        learn(masks, str(task), task, weights=False)
    assert bits(model) == before


def test_exact_counts_in_every_layer():
    """The nearest whole entry, half to even, and never none."""
    model = network(widths=(12, 25, 7, 3))
    for density in (0.001, 0.02, 0.1, 0.5, 1.0):
        masks = Supermasks(model, density=density)
        with masks.learn_mask("random"):
            pass
        for each in masks["random"].tensors:
            assert each.entries == max(1, round(density * each.numel))
        at_most = density if density < 1 else None
        assert_mask_density(masks["random"], at_least=density, at_most=at_most)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40), st.data())
def test_ties_are_cut_in_row_order(values, data):
    """The first of equals, as a stable sort has them; exactly as many as asked for."""
    count = data.draw(st.integers(1, len(values)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))  # two ways to find them
    found = top_k(torch.tensor(values, dtype=dtype), count)
    best = sorted(range(len(values)), key=lambda place: -values[place])[:count]
    assert sorted(found.nonzero()[:, 0].tolist()) == sorted(best)


def test_scores_are_kaiming_uniform_and_their_own():
    """±1/√fan_in with a = √5; by seed, task and weight."""
    masks = Supermasks(torch.nn.Conv2d(8, 64, 3), density=0.1)
    (layer,) = masks._layers
    scores = draw_scores(layer, 0, 1)
    limit = math.sqrt(6 / ((1 + 5) * 8 * 9))
    assert float(scores.abs().max()) == pytest.approx(limit, rel=0.01)
    assert float(scores.std()) == pytest.approx(limit / math.sqrt(3), rel=0.02)
    assert torch.equal(scores, draw_scores(layer, 0, 1))
    assert not torch.equal(scores, draw_scores(layer, 0, 2))
    assert not torch.equal(scores, draw_scores(layer, 1, 1))


def test_straight_through_gradients():
    """By hand: the gradient of the mask passes to |score|, kept or not; none to the weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator, requires_grad=True)
    scores = torch.randn(5, 7, generator=generator)
    inputs, target = torch.randn(3, 7, generator=generator), torch.randn(3, 5, generator=generator)
    best = BestScores(scores.clone(), 9)
    seen = best(weight)
    ((inputs @ seen.T - target) ** 2).sum().backward()

    order = scores.abs().flatten().argsort(descending=True)
    mask = torch.zeros(35).index_fill(0, order[:9], 1.0).reshape(5, 7)
    assert torch.equal(seen, weight.detach() * mask)
    of_seen = 2 * (inputs @ (weight.detach() * mask).T - target).T @ inputs
    expected = of_seen * weight.detach() * torch.where(scores < 0, -1.0, 1.0)
    torch.testing.assert_close(best.scores.grad, expected)
    assert weight.grad is None
    assert (expected[mask == 0] != 0).all()


def test_random_masks_leave_what_chance_leaves():
    """E|E_t|/|M_t| = (1 − ρ)^(t−1) and union 1 − (1 − ρ)^T, within binomial error."""
    density, tasks, numel = 0.1, 20, 200 * 300
    masks = Supermasks(torch.nn.Linear(300, 200, bias=False), density=density, keep_scores=False)
    for task in range(tasks):
        with masks.learn_mask(str(task)):
            pass
    for place, (task, exclusive) in enumerate(masks.exclusive.items()):
        share = (1 - density) ** place
        error = math.sqrt(share * (1 - share) / masks[task].count)
        assert abs(exclusive.count / masks[task].count - share) <= 4 * error
    union = 1 - (1 - density) ** tasks
    assert abs(masks.used.density - union) <= 4 * math.sqrt(union * (1 - union) / numel)


def test_exclusive_entries_are_disjoint_and_all_that_is_used():
    """By plain booleans: no entry twice, none lost; and the order of tasks matters."""
    masks = Supermasks(network(), density=0.3)
    for task in range(4):
        learn(masks, str(task), task, weights=False)
    for name in masks["0"]:
        stacked = np.stack([each[name] for each in masks.exclusive.values()])
        together = np.stack([each[name] for each in masks.values()])
        assert (stacked.sum(0) <= 1).all()
        assert (stacked.any(0) == together.any(0)).all()
        assert (together.sum(0) > 1).any()  # only the trained part is exclusive
        assert (masks.used[name] == together.any(0)).all()
    assert list(masks) == list(masks.exclusive) == ["0", "1", "2", "3"]


def test_a_start_is_a_copy():
    """The new task starts from the scores of the old one, whose own never change."""
    masks = Supermasks(network(), density=0.2)
    for task in range(2):
        learn(masks, str(task), task, weights=False)
    known = copy.deepcopy(masks._scores)
    old = {task: masks[task] for task in masks}
    with masks.learn_mask("same", start="0"):
        pass
    with masks.learn_mask("mean", start=["0", "1"]) as scores:
        means = [(known["0"][name] + known["1"][name]) / 2 for name in known["0"]]
        assert all(torch.equal(*each) for each in zip(scores, means, strict=True))
        train(masks.model, torch.optim.Adam(scores, lr=0.1), 5)
    assert not (masks["same"] - masks["0"])
    for task, scores in known.items():
        assert all(torch.equal(masks._scores[task][name], each) for name, each in scores.items())
        assert masks[task] is old[task]


def test_the_published_transfer_changes_an_old_mask():
    """`scores = old.data; scores += other` averages in place; ours leaves the old mask alone."""
    masks = Supermasks(network(), density=0.2)
    for task in range(2):
        learn(masks, str(task), task, weights=False)
    published = {task: copy.deepcopy(scores) for task, scores in masks._scores.items()}
    for name in published["0"]:
        for place, task in enumerate(("0", "1")):
            if place == 0:
                scores = published[task][name]
            else:
                scores += published[task][name]
        scores /= 2

    def mask_of(scores):
        return [top_k(scores[each.name].abs(), each.kept) for each in masks._layers]

    before = mask_of(masks._scores["0"])
    assert not all(torch.equal(*each) for each in zip(mask_of(published["0"]), before, strict=True))
    with masks.learn_mask("2", start=["0", "1"]):
        pass
    assert all(torch.equal(*each) for each in zip(mask_of(masks._scores["0"]), before, strict=True))
    assert all(
        (masks["0"][each.name] == mask.numpy()).all()
        for each, mask in zip(masks._layers, before, strict=True)
    )


def test_nothing_of_a_block_is_left_on_the_model():
    """Same parameters, order, classes and flags after each block as before it."""

    def shape_of(model):
        named = [(name, id(each), each.requires_grad) for name, each in model.named_parameters()]
        return named, list(model.state_dict()), [type(each) for each in model.modules()]

    model = network()
    model[0].bias.requires_grad_(False)
    before = shape_of(model)
    masks = Supermasks(model, density=0.2)
    assert learn(masks, "one", 1) > 0
    assert shape_of(model) == before
    with masks.apply("one"):
        assert shape_of(model) != before
    assert shape_of(model) == before
    with pytest.raises(KeyError), masks.learn_mask("two"):
        raise KeyError
    assert shape_of(model) == before
    assert list(masks) == ["one"]


def test_a_block_that_raises_leaves_the_weights():
    """Half an epoch is no task: weights are as they were, and it can be learnt again."""
    masks = Supermasks(network(), density=0.2)
    learn(masks, "one", 1, weights=False)
    before = bits(masks.model)
    optimizer = torch.optim.Adam(masks.model.parameters(), lr=0.1)

    def interrupted():
        train(masks.model, optimizer, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), masks.learn_weights("one", optimizer):
        interrupted()
    assert bits(masks.model) == before
    with masks.learn_weights("one", optimizer):
        train(masks.model, optimizer, 1)
    assert bits(masks.model) != before


def test_what_else_changes_is_found_out_and_put_back():
    """Another optimiser that trains a bias besides, and one entry outside the mask."""
    masks = Supermasks(network(), density=0.2)
    learn(masks, "one", 1, weights=False)
    optimizer = torch.optim.Adam(masks.model.parameters(), lr=0.1)
    before = bits(masks.model)
    outside = tuple((~masks["one"]["3.weight"]).nonzero()[each][0] for each in (0, 1))
    for place in ("0.bias", "3.weight"):
        tensor = dict(masks.model.named_parameters())[place].detach()
        with pytest.raises(SubnetError) as caught, masks.learn_weights("one", optimizer):
            tensor[outside[: tensor.dim()]] *= -1
        assert str(caught.value) == (
            f"1 tensor changed that this task may not change: {place}; all of them are put back. "
            "Was something trained besides, by another optimiser, or does a module change its "
            "buffers?"
        )
        assert bits(masks.model) == before


def test_attention_reads_its_masked_weights():
    """`MultiheadAttention` never calls its output layer, and takes weights from it by name."""
    model = torch.nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    masks = Supermasks(model, density=0.3)
    inputs = torch.randn(2, 5, 8)
    with masks.learn_mask("one") as scores:
        model(inputs, inputs, inputs)[0].square().sum().backward()
        assert [bool(each.grad.any()) for each in scores] == [True, True]
        model.eval()
        with torch.no_grad():
            searched = model(inputs, inputs, inputs)[0]
    with masks.apply("one"), torch.no_grad():
        applied = model(inputs, inputs, inputs)[0]
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in by_hand.named_parameters():
            weight *= torch.from_numpy(masks["one"][name])
        torch.testing.assert_close(applied, by_hand(inputs, inputs, inputs)[0])
    torch.testing.assert_close(applied, searched)


def test_bfloat16_weights():
    """Scores stay float32; outputs of old tasks stay to the bit in 16 bits, too."""
    masks = Supermasks(network().bfloat16(), density=0.3)

    def learn_half(name, task):
        with masks.learn_mask(name) as scores:
            assert {each.dtype for each in scores} == {torch.float32}
            half(torch.optim.Adam(scores, lr=0.05), task)
        optimizer = torch.optim.AdamW(masks.model.parameters(), lr=0.02)
        with masks.learn_weights(name, optimizer):
            half(optimizer, task)

    def half(optimizer, task):
        for inputs, labels in batches(task):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(
                masks.model(inputs.bfloat16()).float(), labels
            ).backward()
            optimizer.step()

    learn_half("one", 1)
    inputs = torch.randn(8, 12).bfloat16()
    before = outputs(masks, "one", inputs)
    learn_half("two", 2)
    assert torch.equal(outputs(masks, "one", inputs), before)
