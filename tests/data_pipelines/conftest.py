"""The tokenizer of the toy datasets."""

import pytest

from flamingo_jax.processing.tokenizer import Tokenizer
from tests.data_pipelines.toy_data import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()
