"""The micro model, once for all tests of this room."""

import micro_model
import pytest


@pytest.fixture(scope="session")
def codec():
    return micro_model.make_codec()


@pytest.fixture(scope="session")
def model(codec):
    return micro_model.make_model(codec)


@pytest.fixture(scope="session")
def params(model):
    return micro_model.make_params(model)
