"""Programs of frameworks are served as any program is, so the server that other tests start is used here too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "serving"))
