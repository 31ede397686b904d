"""`python -m dyncore`: the same as the command `dyncore`."""

import sys

from dyncore.cli import main

sys.exit(main())
