"""Frames that each family is shown, against the formula of its publication.

The formulas are written here from the files that the cases name, over frame numbers; ours get the
times of frames, and choose within an interval.
"""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.interop.families import configs
from tpo_jax.data.sampling import SAMPLERS
from tpo_jax.interop.families.registry import family_of


def from_first_to_last(frames, fps, count):
    """`count` numbers in equal steps from 0 to the last frame, cut to whole ones."""
    del fps
    return [int(x) for x in np.linspace(0, frames - 1, count)]


def one_a_second(frames, fps, count):
    """Every round(fps)-th frame, or where those are too many, `from_first_to_last`."""
    numbers = range(0, frames, round(fps))
    return list(numbers) if len(numbers) <= count else from_first_to_last(frames, fps, count)


def middle_of_parts(frames, fps, count):
    """The middle of each of min(count, frames) parts, then the last of them over and over."""
    del fps
    borders = [int(x) for x in np.linspace(0, frames, min(count, frames) + 1)]
    numbers = [(borders[i] + borders[i + 1] - 1) // 2 for i in range(len(borders) - 1)]
    return numbers + numbers[-1:] * (count - len(numbers))


PUBLISHED = {
    # LLaVA-VL/LLaVA-NeXT@df17966 docs/LLaVA_OneVision_Tutorials.ipynb:330
    "llava_onevision": (configs.LLAVA_ONEVISION, from_first_to_last),
    # LLaVA-VL/LLaVA-NeXT@df17966 docs/LLaVA_Video_1003.md:41-47 with force_sample=True, as the
    # release's config.json; llava/utils.py:29-37 in training
    "llava_video": (configs.LLAVA_VIDEO, from_first_to_last),
    # the same lines with force_sample=False; playground/demo/video_demo.py:76-82
    "llava_next_video": (configs.LLAVA_VIDEO | {"force_sample": False}, one_a_second),
    # EvolvingLMMs-Lab/LongVA@f4c8781 README.md:87, local_demo/longva_backend.py:299-301
    "longva": (configs.LONGVA, from_first_to_last),
    # PKU-YuanGroup/Video-LLaVA@984e65b
    # videollava/model/multimodal_encoder/languagebind/video/processing_video.py:93, 101
    "video_llava": (configs.VIDEO_LLAVA, from_first_to_last),
    "video_llava_original": (configs.VIDEO_LLAVA_ORIGINAL, from_first_to_last),
    # OpenGVLab/TPO@ed733bd app.py:245-270 with sample="middle" (491); the same in
    # OpenGVLab/Ask-Anything@4dd8210 video_chat2/dataset/video_utils.py:48-71
    "videochat": (configs.VIDEOCHAT, middle_of_parts),
}


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=60)
@given(frames=st.integers(1, 2000), count=st.integers(1, 128), fps=st.floats(0.51, 120),
       start=st.floats(0, 600), after=st.integers(0, 50))  # fmt: skip
def test_frames_are_those_of_the_published_formula(name, frames, count, fps, start, after):
    """Of clips of a part of a second to an hour, from one frame on, with more and with fewer
    frames than are shown."""
    assume(abs(fps - round(fps)) < 0.49)  # rates there are of the file, here of float32 times
    config, formula = PUBLISHED[name]
    sample = SAMPLERS[family_of(config).sampling(config).method]
    times = np.arange(frames) / fps
    whole = sample(times.astype(np.float32), count)
    assert whole.tolist() == formula(frames, fps, count)
    # The same clip between other frames of a longer video.
    longer = start + np.arange(-after, frames + after) / fps
    inside = sample(longer, count, start, start + times[-1])
    assert (inside - after).tolist() == whole.tolist()


def test_a_clip_of_few_frames():
    """By hand: of three frames a model with places for five gets the last one again."""
    assert middle_of_parts(3, 25.0, 5) == [0, 1, 2, 2, 2]
    assert from_first_to_last(3, 25.0, 5) == [0, 0, 1, 1, 2]
    assert one_a_second(3, 1.2, 5) == [0, 1, 2]
