"""The commands under test, and how often they are killed: a few times in forks of the test process, or with --chaos the real thing."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.kills import Process, command, forked


@pytest.fixture
def chaos(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.getoption("--chaos")


@pytest.fixture
def rng(pytestconfig: pytest.Config) -> random.Random:
    """Seeded by --chaos_seed; the moments of the kills still depend on the machine's clock."""
    return random.Random(pytestconfig.getoption("--chaos_seed"))


@pytest.fixture
def starter(chaos: bool, load_recipe, tmp_path: Path) -> Callable[[str, list[str]], Callable[[], Process]]:
    """`starter("train/dpo.py", flags)` gives the function that starts the recipe once: a fork, with --chaos the command itself."""

    def prepare(recipe: str, flags: list[str]) -> Callable[[], Process]:
        if chaos:
            return lambda: command([recipe, *flags], tmp_path / "log.txt")
        main = load_recipe(recipe).main
        return lambda: forked(lambda: main(flags))

    return prepare
