"""`Supermasks.choose` against finite differences, and `Supermasks.nearest` against brute force."""

import numpy as np
import pytest
import torch

from pytest_subnet import SelectionError, SubnetError, Supermasks


def network(widths=(12, 32, 32, 4)):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(widths[0], widths[1]),
            torch.nn.Tanh(),
            torch.nn.Dropout(0.5),
            torch.nn.Linear(widths[1], widths[2]),
            torch.nn.Tanh(),
            torch.nn.Linear(widths[2], widths[3]),
        )


def learnt(tasks, *, density=0.2, steps=0, dtype=torch.float32):
    """Masks of some tasks: clouds of points, each task with centres of its own."""
    masks = Supermasks(network().to(dtype), density=density)
    for task in range(tasks):
        with masks.learn_mask(f"task {task}") as scores:
            optimizer = torch.optim.Adam(scores, lr=0.02)
            masks.model.eval()
            for step in range(steps):
                inputs, labels = points(task, 64, seed=step)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(masks.model(inputs), labels).backward()
                optimizer.step()
    return masks


def points(task, count, seed=0):
    centres = 3 * torch.randn(4, 12, generator=torch.Generator().manual_seed(1000 + task))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    return centres[labels] + torch.randn(count, 12, generator=generator), labels


def test_slopes_are_finite_differences():
    """∂H/∂α_t by moving each α_t a little, the mixed weights built by hand."""
    masks = learnt(5, dtype=torch.float64)
    model = masks.model.eval()
    weights = {name: dict(model.named_parameters())[name].detach() for name in masks["task 0"]}
    inputs = torch.randn(7, 12, dtype=torch.float64)

    @torch.no_grad()
    def entropy(alphas):
        mixed = {
            name: weight
            * sum(
                float(alpha) * torch.from_numpy(mask[name]).double()
                for alpha, mask in zip(alphas, masks.values(), strict=True)
            )
            for name, weight in weights.items()
        }
        outputs = torch.func.functional_call(model, mixed, (inputs,)).softmax(-1)
        return float(-(outputs * outputs.log()).sum(-1).mean())

    choice = masks.choose(inputs)
    middle, small = np.full(5, 1 / 5), 1e-6
    slopes = [
        (entropy(middle + small * side) - entropy(middle - small * side)) / (2 * small)
        for side in np.eye(5)
    ]
    assert list(choice.slopes.values()) == pytest.approx(slopes, rel=1e-6, abs=1e-9)
    assert choice.task == f"task {int(np.argmin(slopes))}"


def permuted(task, count, seed):
    """Points around ten centres, the coordinates in another order in each task."""
    centres = torch.randn(10, 64, generator=torch.Generator().manual_seed(5))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(task))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    return (centres[labels] + torch.randn(count, 64, generator=generator))[:, order], labels


def test_the_task_of_most_batches_is_found():
    """Four tasks, data of each: without a task id."""
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 100, bias=False), torch.nn.ReLU(), torch.nn.Linear(100, 10, bias=False)
    )
    masks = Supermasks(model, density=0.1, signed=True)
    for task in range(4):
        with masks.learn_mask(f"task {task}") as scores:
            optimizer = torch.optim.Adam(scores, lr=0.02)
            for step in range(40):
                inputs, labels = permuted(task, 64, step)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
    found = [
        masks.choose(permuted(task, 64, 1000 + seed)[0]).task == f"task {task}"
        for task in range(4)
        for seed in range(4)
    ]
    assert sum(found) >= 0.75 * len(found)


def test_choosing_changes_nothing():
    """Modes, gradients and weights are as they were; dropout is off meanwhile."""
    masks = learnt(2)
    masks.model.train()
    masks.model[3].eval()
    modes = [each.training for each in masks.model.modules()]
    before = {name: each.clone() for name, each in masks.model.state_dict().items()}
    inputs = torch.randn(3, 12)
    with torch.no_grad():
        first = masks.choose(inputs)
    assert masks.choose(inputs) == first == masks.choose(inputs)
    with torch.inference_mode():
        assert masks.choose(inputs) == masks.choose(inputs.clone()) == first
    assert [each.training for each in masks.model.modules()] == modes
    assert all(torch.equal(before[name], each) for name, each in masks.model.state_dict().items())
    assert all(each.grad is None for each in masks.model.parameters())


def test_models_with_keyword_arguments_and_logits():
    """As transformers' models are called."""

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, *, input_values):
            return type("Output", (), {"logits": self.inner(input_values)})

    masks = Supermasks(Wrapped(), density=0.3)
    with masks.learn_mask("one"):
        pass
    assert masks.choose({"input_values": torch.randn(2, 12)}).task == "one"


def test_what_cannot_be_chosen():
    """No task, one class, and outputs that are no numbers."""
    model = network()
    masks = Supermasks(model, density=0.3)
    with pytest.raises(SelectionError) as caught:
        masks.choose(torch.randn(2, 12))
    assert str(caught.value) == "choose: no task was learnt yet; learn one with learn_mask"
    masks = learnt(1)
    with pytest.raises(SubnetError) as caught:
        masks.choose(torch.full((2, 12), float("nan")))
    assert str(caught.value) == ("the outputs hold 8 NaN or Inf; a task cannot be told from them")
    masks = Supermasks(network((12, 8, 8, 1)), density=0.3)
    with masks.learn_mask("one"):
        pass
    with pytest.raises(ValueError, match="two classes or more") as caught:
        masks.choose(torch.randn(2, 12))
    assert str(caught.value) == (
        "the outputs have shape [2, 1], and an entropy needs […, classes] with two classes or more"
    )
    with masks.apply("one"):  # the block has ended
        pass


def test_nearest_against_brute_force():
    """Accuracies of the vote, example by example."""
    masks = learnt(3)
    inputs, labels = points(0, 90, seed=5)
    found = masks.nearest(inputs, labels, neighbours=7)
    known = int(90 * 0.66)
    for task in masks:
        with masks.apply(task) as model, torch.no_grad():
            model.eval()
            places = model(inputs).double().numpy()
        right = 0
        for row in range(known, 90):
            distances = ((places[:known] - places[row]) ** 2).sum(1)
            votes = np.bincount(labels[:known][np.argsort(distances)[:7]])
            right += int(votes.argmax() == labels[row])
        assert found.accuracies[task] == pytest.approx(right / (90 - known))
    assert found.task == max(found.accuracies, key=found.accuracies.__getitem__)
    assert found.classes == 4


def test_nearest_finds_the_same_task_again():
    """Of three tasks, the one whose data it is; and none for noise that has no classes."""
    masks = learnt(3, density=0.1, steps=60)
    inputs, labels = points(1, 400, seed=77)
    assert masks.nearest(inputs, labels, neighbours=20).task == "task 1"
    noise = torch.zeros(400, 12)
    twisted = torch.cat([torch.zeros(264), torch.ones(136)]).long()
    assert masks.nearest(noise, twisted).task is None


@pytest.mark.parametrize(
    ("labels", "neighbours", "text"),
    [
        (torch.zeros(50).long(), 5, "labels hold 1 class; two or more are needed to be told apart"),
        (
            torch.arange(50) % 2,
            100,
            "neighbours=100 is more than the 33 examples that are learnt from (66 % of 50); give "
            "more examples, or a smaller number",
        ),
        (torch.arange(50) % 2, 0, "neighbours=0 is not an integer of at least 1"),
        (
            torch.rand(50),
            5,
            "labels is torch.float32 [50]; one integer an example is needed: [50]",
        ),
    ],
)
def test_what_cannot_be_compared(labels, neighbours, text):
    """Each by name."""
    with pytest.raises(ValueError, match=" ") as caught:
        learnt(1).nearest(torch.randn(50, 12), labels, neighbours=neighbours)
    assert str(caught.value) == text


def test_logits_that_16_bits_cannot_tell_apart():
    """±40,000: their difference is no float16, and its share of the entropy was 0 · ∞."""
    model = torch.nn.Linear(1, 2, bias=False, dtype=torch.float16)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[40_000.0], [-40_000.0]]))
    masks = Supermasks(model, density=1.0)
    with masks.learn_mask("only"):
        pass
    assert masks.choose(torch.ones(1, 1, dtype=torch.float16)).slopes == {"only": 0}


def test_a_slope_that_is_none():
    """The root of 0 is finite, and its slope is not."""

    class Root(torch.nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs).sub(super().forward(inputs)).sqrt()

    masks = Supermasks(Root(2, 2), density=0.5)
    with masks.learn_mask("only"):
        pass
    with pytest.raises(SubnetError) as caught:
        masks.choose(torch.ones(1, 2))
    assert str(caught.value) == (
        "the entropy of the outputs has no finite slope; a task cannot be told from them"
    )
