"""Commands, run in this process."""

import pytest

from latentmem import cli


@pytest.fixture
def run(capsys):
    """Run a command; returns its exit status and what it wrote to standard output and standard error."""

    def run(*words):
        capsys.readouterr()
        status = cli.main(words)
        out, err = capsys.readouterr()
        return status, out, err

    return run
