"""A tiny real language model for users' own tests, made on the spot: nothing is downloaded.

Nothing here is registered by itself; a suite asks for the fixture in its `conftest.py`.
"""

from pytest_subnet.testing.fixture import laboratory
from pytest_subnet.testing.laboratories import Laboratory, build_laboratory

__all__ = ["Laboratory", "build_laboratory", "laboratory"]
