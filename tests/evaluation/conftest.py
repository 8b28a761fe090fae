"""A prepared data set of a few rendered videos and images, made once."""

import pytest

from tpo_jax import prepare
from tpo_jax.data.moving_shapes import __main__ as moving_shapes


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Folder with prepared train and test splits: three videos and an image each."""
    root = tmp_path_factory.mktemp("evaluation")
    render = ["--out", str(root / "videos"), "--videos", "6", "--images", "2", "--seed", "5"]
    assert moving_shapes.main([*render, "--splits", "train:3,test:3"]) == 0
    for split in ("train", "test"):
        arguments = ["run", "--data", str(root / "videos" / split), "--size", "64"]
        assert prepare.main([*arguments, "--out", str(root / "data" / split)]) == 0
    return root / "data"
