"""How the tests are run: which processes, which files first. What test files share is in prepared.py and helpers.py."""

import os
import shutil

import pytest

import warm

# `make test` runs all tests of a file in one process, of a few. The files that take longest come first.
LONGEST = (
    *("pipeline", "processes", "publish", "views", "tracking", "delivery", "team", "bench", "demo", "distributed"),
    *("experiments", "training", "registry", "samplers", "data", "metrics", "features", "folder", "evaluate", "install"),
)


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    if not is_worker:  # one server for all processes of `make test`
        config.warm_server = warm.start_server()
        config.option.tx = [f"{process}//python={warm.FOLDER / 'python'}" for process in config.option.tx]  # which start warm
    if is_worker or config.option.dist == "no":  # this process runs tests, and doesn't only tell others to
        config.pluginmanager.import_plugin("prepared")


def pytest_unconfigure(config: pytest.Config) -> None:
    if server := getattr(config, "warm_server", None):
        server.stdin.close()
        server.wait(30)
        shutil.rmtree(warm.SESSION)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, because some tests wait for servers; at most four."""
    return min(4, (os.cpu_count() or 1) + 1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem.removeprefix("test_"), len(order)))
