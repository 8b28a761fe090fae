import pytest
from fake_dataset import fake_dataset
from small_pipeline import HEADS

from tpo_jax.data.text import TextCodec, add_task_tokens, texts_of, train_tokenizer
from tpo_jax.models.presets import micro


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    tokenizer = train_tokenizer(texts_of(fake_dataset()))
    add_task_tokens(tokenizer, HEADS)
    return TextCodec(tokenizer)


@pytest.fixture(scope="module")
def model(codec):
    return micro(HEADS, codec.task_tokens)
