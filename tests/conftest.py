"""Torch on one thread and hypothesis without deadlines, so that results depend neither on the number of cores nor on how busy they are."""

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

import flows  # noqa: F401  sets the environment before anything imports Prefect

torch.set_num_threads(1)
settings.register_profile("headwise", deadline=None, derandomize=True)
settings.load_profile("headwise")


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """Prefect's own test server with a database of its own; it takes seconds, so it is started once and only if a test asks."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=300):
        yield
