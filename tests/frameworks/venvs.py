"""An environment for each framework, from the versions in `requirements/`; `make frameworks` makes those that lack.

A folder's name ends with a hash of the requirements, so a changed file is a new environment.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).with_name("requirements")
FOLDER = Path(os.environ.get("LATENTMEM_TEST_FRAMEWORKS", Path.home() / ".cache" / "latentmem-frameworks"))
NAMES = sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))
TRAINED = ("agent_framework", "autogen", "langgraph", "openai_agents")
"""Those whose programs are trained."""


def environment(name):
    """The folder in which the environment of a framework is, or would be."""
    return FOLDER / f"{name}-{hashlib.sha256((REQUIREMENTS / f'{name}.txt').read_bytes()).hexdigest()[:8]}"


def python_of(name):
    """The interpreter of a framework's environment; skips where it was not made."""
    folder = environment(name)
    if not (folder / ".made").exists():
        pytest.skip(f"no environment of {name} at {folder}; `make frameworks` makes it")
    return folder / "bin" / "python"


def make(name):
    """Make the environment of a framework, unless it is there."""
    folder = environment(name)
    if (folder / ".made").exists():
        return
    print(f"{name}: {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "-r", REQUIREMENTS / f"{name}.txt"], check=True)
    (folder / ".made").touch()


if __name__ == "__main__":
    for each in sys.argv[1:] or NAMES:
        make(each)
