"""One whole run of the pair pipeline, for the tests of a file."""

import pytest
from fake_pipeline import Speaker, run


@pytest.fixture(scope="module", autouse=True)
def no_disk():
    """A killed process loses nothing that it wrote; waiting for the disk takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    speaker = Speaker()
    counts = run(path, speaker)
    return path, counts, speaker.asked
