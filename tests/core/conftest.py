import pytest
import tiny as support


@pytest.fixture
def tiny():
    return support.tiny_network()


@pytest.fixture
def conditioning():
    return support.random_conditioning()
