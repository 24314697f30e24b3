"""`python -m latentmem.cli WORDS...` does what `latentmem WORDS...` does; multi-process launchers need this form."""

import sys

from latentmem.cli.program import main

sys.exit(main())
