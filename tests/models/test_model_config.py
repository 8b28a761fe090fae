import dataclasses
import json

import pytest

from tpo_jax.models.config import LoraConfig, ModelConfig
from tpo_jax.models.presets import PRESETS, micro, preset, tiny
from tpo_jax.models.sam2_config import sam2_size
from tpo_jax.models.video_language import FunctionalModel

HEADS = ("region", "temporal", "mask")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name):
    config = preset(name, HEADS)
    config = dataclasses.replace(config, lora=LoraConfig("q_proj", 4, 8.0))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_7b_preset_has_the_published_sizes():
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(FunctionalModel(preset("7b")).abstract())[0]
    sizes = {"/".join(k.key for k in path): leaf.size for path, leaf in leaves}
    language = sum(size for path, size in sizes.items() if path.startswith("language/"))
    vision = sum(size for path, size in sizes.items() if path.startswith("vision/"))
    # Qwen2-7B: 7,615,616,512 parameters with a vocabulary of 152,064.
    assert language == 7_615_616_512
    # SigLIP-so400m: 27 layers of 1152 with an MLP of 4304, without the pooling head.
    assert vision == pytest.approx(412e6, rel=0.01)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision", {"image_size": 30}, r"vision.image_size=30: must be a multiple .* stride 8"),
        ("connector", {"time_periods": (4.0, 1.0)}, r"connector.time_periods=\(4.0, 1.0\): use"),
        ("vision", {"heads": 5}, "vision.heads=5: must divide vision.width=32"),
        ("vision", {"temporal": "joint"}, 'vision.temporal=\'joint\': use "divided" or "none"'),
        ("vision", {"stem_widths": (16,)}, "vision.stem_widths=.*needs one width for each"),
        ("vision", {"stem_widths": (16, 64)}, "must end in vision.width=32"),
        ("language", {"vocab_size": 1000}, "round up to a multiple of 128: 1024"),
        ("language", {"num_tokens": 2000}, "language.num_tokens=2000: must be in"),
        ("language", {"kv_heads": 3}, "language.kv_heads=3: must divide language.heads=4"),
        ("language", {"head_dim": 7}, "language.head_dim=7: must be even"),
        ("language", {"dropout": 1.0}, r"language.dropout=1.0: must be in \[0, 1\)"),
        ("language", {"attention": "flash"}, "language.attention='flash': use one of"),
        ("language", {"depth": 0}, "language.depth=0: must be above 0"),
        ("language", {"remat": "all"}, "language.remat='all': use one of"),
        ("vision", {"remat": "all"}, "vision.remat='all': use one of"),
        ("head", {"heads": 5}, "head.heads=5: must divide head.width=32"),
    ],
)
def test_a_wrong_value_is_named_with_its_fix(part, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(getattr(micro(), part), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype='float16': use one of"),
        ({"heads": ("mask", "mask")}, "names a head twice"),
        ({"tokens": {"<boxes>": 5000}}, r"tokens\['<boxes>'\]=5000: must be below"),
        ({"head": dataclasses.replace(micro().head, mask_stride=5)}, "head.mask_stride=5"),
        ({"connector": dataclasses.replace(micro().connector, grid=3)}, "connector.grid=3"),
    ],
)
def test_parts_have_to_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(micro(), **changes)


def test_heads_need_ids_for_their_tokens():
    config = dataclasses.replace(micro(("region",)), tokens={"<boxes>": 1001})
    with pytest.raises(ValueError, match=r"lacks the ids of \['<box_begin>', '<track_box>'\]"):
        FunctionalModel(config)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="'pose' is not a head; known: .*'region'"):
        micro(("pose",))
    with pytest.raises(ValueError, match="'huge' is unknown; use one of"):
        preset("huge")


@pytest.mark.parametrize(("old", "name"), [(True, "full"), (False, "")])
def test_remat_was_a_bool_in_older_files(old, name):
    data = dataclasses.replace(micro(), sam2=sam2_size("micro")).to_dict()
    data["sam2"]["remat"] = old
    assert ModelConfig.from_dict(data).sam2.remat == name
    assert dataclasses.replace(micro().language, remat=old).remat == name
    assert dataclasses.replace(micro().vision, remat=old).remat == name


def test_config_files_are_read_strictly():
    data = tiny().to_dict()
    with pytest.raises(ValueError, match="vision.colour.*unknown key"):
        ModelConfig.from_dict(data | {"vision": data["vision"] | {"colour": 1}})
    with pytest.raises(ValueError, match="language.width.*is missing"):
        language = {k: v for k, v in data["language"].items() if k != "width"}
        ModelConfig.from_dict(data | {"language": language})
    with pytest.raises(ValueError, match="format_version=2"):
        ModelConfig.from_dict(data | {"format_version": 2})
    with pytest.raises(ValueError, match="vision.*must be an object"):
        ModelConfig.from_dict(data | {"vision": 3})
