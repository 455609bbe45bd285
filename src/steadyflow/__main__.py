"""`python -m steadyflow` is the command `steadyflow`."""

import sys

from steadyflow.cli import main

sys.exit(main())
