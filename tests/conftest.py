"""Offline, and one tiny model for all tests of a worker."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.fixtures import tiny


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_accelerator_left():
    """A training sets the process's precision once; the next test's training may want another."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def model():
    return tiny.make_tiny_model()


@pytest.fixture(scope="session")
def processor(model):
    return tiny.make_tiny_processor(model.config)


@pytest.fixture(scope="session")
def decoder():
    return tiny.make_tiny_decoder()
