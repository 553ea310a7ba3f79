from pytest_subnet.testing import laboratory  # noqa: F401 - as a user takes it
