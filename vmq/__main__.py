"""`python -m vmq` is `vmq`."""

import sys

from vmq.cli import main

sys.exit(main())
