"""`python -m pytest_subnet.cli`, where the script is not on the path."""

import sys

from pytest_subnet.cli import main

sys.exit(main())
