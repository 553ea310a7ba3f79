"""The fixture record_update: what the issue's unit test of a trainer needs."""

MODEL = """
    import torch
    from pytest_subnet import assert_frozen, assert_updated, update_sparsity

    def train(model):
        model(torch.ones(2, 4)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= parameter.grad

    def linear():
        model = torch.nn.Linear(4, 4)
        model.bias.requires_grad_(False)
        return model
"""


def test_a_training_step_is_recorded(project):
    project.makepyfile(
        MODEL
        + """
    def test_trains(record_update):
        model = linear()
        with record_update(model) as update:
            train(model)
        assert_updated(update, "weight")
        assert_frozen(update, "bias")

    def test_keeps_on_the_device(record_update):
        with record_update(linear(), keep_on="device") as update: ...
        assert update.kept_on == "device"

    def test_zero_steps(record_update):
        with record_update(linear()) as update: ...
        assert_updated(update, "*")
        """
    )

    result = project.runpytest()

    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            '>       assert_updated(update, "[*]")',
            "E       AssertionError: 2 of 2 tensors did not move",
        ]
    )


def test_tolerances_of_the_ini_file_are_frozen_with_the_rest(project):
    project.makeini("[pytest]\nsubnet_tolerances = atol=0.25")
    project.makepyfile(
        MODEL
        + """
    def test_later(record_update):
        model = linear()
        with record_update(model) as update:
            train(model)
        train(model)
        assert update_sparsity(update, atol=0.25).updated == 16
        """
    )

    project.runpytest().assert_outcomes(passed=1)


def test_an_error_ends_at_the_line_that_asked(project):
    project.makepyfile(
        MODEL
        + """
    def test_inside(record_update):
        with record_update(linear()) as update:
            assert_updated(update, "*")

    def test_meta(record_update):
        model = linear()
        with record_update(model):
            model.to("meta")
        """
    )

    result = project.runpytest()

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            '>           assert_updated(update, "[*]")',
            "E           pytest_subnet.errors.SubnetError: this update is still being recorded: *",
            "",
            "test_*.py:*: SubnetError",
            "*test_meta*",
            ">       with record_update(model):",
            "E       pytest_subnet.errors.CheckpointError: * has no data here: it is on the meta *",
            "",
            "test_*.py:*: CheckpointError",
        ]
    )
    result.stdout.no_fnmatch_line("*recorder.py*")
    result.stdout.no_fnmatch_line("*contextlib.py*")
