"""Offline, and one tiny model for all tests of a worker."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.fixtures import tiny


torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model():
    return tiny.make_tiny_model()


@pytest.fixture(scope="session")
def processor(model):
    return tiny.make_tiny_processor(model.config)


@pytest.fixture(scope="session")
def decoder():
    return tiny.make_tiny_decoder()
