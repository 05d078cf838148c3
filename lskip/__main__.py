"""`python -m lskip`."""

import sys

from lskip.cli import main

sys.exit(main())
