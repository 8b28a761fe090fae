"""Prompts about a clip, token by token, as the processors of `transformers` make them; and what
they save of how images and videos become pixels.

Templates are in the words of its documentation (docs/source/en/model_doc/llava_onevision.md:
`<|im_start|>user <video>\\nQuestion?<|im_end|><|im_start|>assistant`; video_llava.md:
`USER: <video>\\nQuestion? ASSISTANT:`). Published tokenizers are not here: tiny ones of their kind
stand for them.
"""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from tests.interop.families.configs import LLAVA_ONEVISION, ONEVISION_JINJA, VIDEO_LLAVA
from tests.interop.families.published_folder import sized
from tests.interop.families.test_templates import (
    VIDEO_LLAVA_JINJA,
    chatml_tokenizer,
    llama_tokenizer,
)
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.families.registry import family_of
from tpo_jax.interop.families.source import open_codec, read_config

pytestmark = pytest.mark.parity
FRAMES, SIZE, PATCH = 3, 24, 8
MEAN = [0.5, 0.4, 0.3]
# A processor looks up the classes that its video processor may have, which needs torchvision.
UNCHECKED = ("check_argument_for_proper_class", lambda *_: None)
QUESTION = "What? It USER: ASSISTANT:"


class Frames:
    """In the place of a video processor: shapes alone. Pixels: test_vision_preprocess.py."""

    model_input_names = ["pixel_values_videos"]

    def __call__(self, videos, **options):
        return {"pixel_values_videos": np.zeros((1, FRAMES, 3, SIZE, SIZE), np.float32)}


def onevision(tokenizer, frames):
    from transformers import LlavaOnevisionProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(), tokenizer=tokenizer,
        video_processor=frames, num_image_tokens=(SIZE // PATCH) ** 2,
        vision_feature_select_strategy="full", chat_template=ONEVISION_JINJA,
    )  # fmt: skip


def video_llava(tokenizer, frames):
    from transformers import VideoLlavaProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    return VideoLlavaProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(),  # any: there is no image
        tokenizer=tokenizer, video_processor=frames, patch_size=PATCH,
        vision_feature_select_strategy="default", chat_template=VIDEO_LLAVA_JINJA,
    )  # fmt: skip


FAMILIES = {
    "llava_onevision": (LLAVA_ONEVISION, ONEVISION_JINJA, chatml_tokenizer, onevision),
    "video_llava": (VIDEO_LLAVA, VIDEO_LLAVA_JINJA, llama_tokenizer, video_llava),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_about_a_clip_is_that_of_the_processor(name, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from transformers import PreTrainedTokenizerFast, ProcessorMixin

    monkeypatch.setattr(ProcessorMixin, *UNCHECKED)
    data, jinja, make_tokenizer, make_processor = FAMILIES[name]
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<image>", "<video>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(sized(data)))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": jinja}))

    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    processor = make_processor(PreTrainedTokenizerFast(tokenizer_object=again), Frames())
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    clip = np.zeros((FRAMES, SIZE, SIZE, 3), np.uint8)
    expected = np.asarray(processor(text=prompt, videos=[clip])["input_ids"])[0].tolist()

    codec, (_, config, _) = open_codec(tmp_path), read_config(tmp_path, {})
    visual, before = config.num_visual_tokens(FRAMES), codec.template.visual_offset
    prefix = codec.build_prefix(visual)
    prefix[before : before + visual] = again.token_to_id("<video>")
    assert [*prefix.tolist(), *codec.build_branch(QUESTION, None).ids.tolist()] == expected
    assert expected.count(again.token_to_id("<video>")) == visual


def settings(name):
    """(image processor, video processor) of `transformers` for a tower of SIZE pixels."""
    if name == "llava_onevision":
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )
        from transformers.models.llava_onevision.video_processing_llava_onevision import (
            LlavaOnevisionVideoProcessor,
        )

        own = {"size": {"height": SIZE, "width": SIZE}, "image_mean": MEAN}
        grid = LLAVA_ONEVISION["image_grid_pinpoints"]
        return (LlavaOnevisionImageProcessorPil(image_grid_pinpoints=grid, **own),
                LlavaOnevisionVideoProcessor(**own))  # fmt: skip
    from transformers.models.video_llava.image_processing_video_llava import (
        VideoLlavaImageProcessor,
    )
    from transformers.models.video_llava.video_processing_video_llava import (
        VideoLlavaVideoProcessor,
    )

    own = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE},
           "image_mean": MEAN}  # fmt: skip
    return VideoLlavaImageProcessor(**own), VideoLlavaVideoProcessor(**own)


def test_tiles_that_config_json_does_not_say_are_those_of_the_class():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlavaOnevisionConfig()
    silent = ("image_grid_pinpoints", "vision_aspect_ratio")
    data = {name: value for name, value in LLAVA_ONEVISION.items() if name not in silent}
    ours = family_of(data).model_config(data, {}).connector
    assert [list(pair) for pair in ours.resolutions] == theirs.image_grid_pinpoints
    assert f"anyres_max_{ours.max_tiles}" == theirs.vision_aspect_ratio


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_are_read_from_what_the_processors_save(name, tmp_path, monkeypatch):
    """As one file of both, as version 5 writes it, and as two files of its parts."""
    pytest.importorskip("transformers")
    from transformers import (
        LlavaOnevisionProcessor,
        PreTrainedTokenizerFast,
        ProcessorMixin,
        VideoLlavaProcessor,
    )

    monkeypatch.setattr(ProcessorMixin, *UNCHECKED)
    data, jinja, make_tokenizer, _ = FAMILIES[name]
    image, video = settings(name)
    make = {"llava_onevision": LlavaOnevisionProcessor, "video_llava": VideoLlavaProcessor}[name]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer())
    processor = make(
        image_processor=image, tokenizer=tokenizer, video_processor=video, chat_template=jinja
    )
    for folder, saved in (("joint", [processor]), ("apart", [image, video])):
        path = tmp_path / folder
        for one in saved:
            one.save_pretrained(path)
        (path / "config.json").write_text(json.dumps(sized(data)))
        assert read_config(path, {})[1].vision.mean == tuple(MEAN)
    joint = json.loads((tmp_path / "joint" / "processor_config.json").read_text())
    assert joint["video_processor"]["image_mean"] == MEAN
    joint["video_processor"]["resample"] = 2
    (tmp_path / "joint" / "processor_config.json").write_text(json.dumps(joint))
    with pytest.raises(FamilyError, match="processor_config.json: video_processor: resample=2"):
        read_config(tmp_path / "joint", {})
