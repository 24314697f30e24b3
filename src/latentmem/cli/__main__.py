"""`python -m latentmem.cli WORDS...` is what `latentmem WORDS...` is; launchers of several processes need it so."""

import sys

from latentmem.cli.program import main

sys.exit(main())
