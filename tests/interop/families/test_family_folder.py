"""A published folder in and out again, through the command's own functions."""

import dataclasses
import json
import runpy
import shutil
import sys

import gcs_server
import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from tests.interop.families.configs import LLAVA_ONEVISION, LLAVA_VIDEO, LONGVA, VIDEO_LLAVA
from tests.interop.families.published_folder import same_tensors, sized, write_published
from tpo_jax import convert
from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.buckets import Bucket
from tpo_jax.data.pipeline import read_buckets, row_builder, shown_frames
from tpo_jax.data.text import TextCodec
from tpo_jax.errors import UserError
from tpo_jax.evaluation.evaluator import Evaluator, Settings
from tpo_jax.interop import folder, huggingface, tensors
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.families.folder import export_family, import_family, option
from tpo_jax.interop.families.source import is_family, read_config
from tpo_jax.interop.huggingface import read_tensors
from tpo_jax.interop.output import OutputError
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.paths import flatten
from tpo_jax.parallel.rules import param_shardings
from tpo_jax.predict import Predictor
from tpo_jax.training.config import validate
from tpo_jax.training.dry_run import DryRun
from tpo_jax.training.program import make_program
from tpo_jax.training.start import initial_params, make_model_config

DATA = sized(LLAVA_VIDEO)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """LLaVA-Video's layout with random bfloat16 weights and a buffer that nobody uses."""
    path = tmp_path_factory.mktemp("published")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    write_published(path, DATA, **buffer)
    return path


@pytest.fixture(scope="module")
def model(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("imported") / "model"
    import_family(source, path)
    return path


@pytest.mark.parametrize("layout", ["published", "model"])
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_every_byte_of_a_folder_is_read_once_whatever_the_mesh(
    source, model, monkeypatch, layout, sizes
):
    """By the rules that training has; all eight devices are this process's own."""
    path = {"published": source, "model": model}[layout]
    leaves = {name: np.asarray(leaf) for name, leaf in folder.open_leaves(path).items()}
    abstract = FunctionalModel(folder.load_config(path)).abstract()
    shardings = param_shardings(abstract, make_mesh(sizes))
    wanted = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    split = {name for name, leaf in flatten(wanted).items()
             if leaf.sharding.shard_shape(leaf.shape) != leaf.shape}  # fmt: skip
    assert "language/embed/table" in split
    assert {name for name in leaves if name.endswith("_proj/kernel")} <= split
    read, real = [], tensors._fill_run

    def counted(out, stream, start):
        read.append(out.nbytes)
        real(out, stream, start)

    monkeypatch.setattr(tensors, "_fill_run", counted)
    loaded = folder.load_into(wanted, path).leaves
    files = read_tensors(source) if layout == "published" else leaves
    assert sum(read) == sum(x.nbytes for name, x in files.items() if "inv_freq" not in name)
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(np.asarray(loaded[name]), leaf.astype(loaded[name].dtype))


def llava_video_config(init=None):
    get_config = runpy.run_path("configs/llava_video.py")["get_config"]
    return get_config(f"init={init},tiny" if init else "tiny")


def test_in_and_out_again(source, tmp_path):
    lines = import_family(source, tmp_path / "model")
    assert any("64, evenly; time instruction: yes" in line for line in lines)
    assert any("carried" in line and "inv_freq" in line for line in lines)
    assert "an answer stops at: <|im_end|>, <|endoftext|>" in lines
    config, params, codec = folder.load_model(tmp_path / "model")
    assert config.dtype == "bfloat16" and config.vision.kind == "siglip"
    assert params["vision"]["layers"]["self_attn"]["q_proj"]["kernel"].dtype == ml_dtypes.bfloat16
    assert codec.template.sampling == "evenly" and codec.template.time_instruction
    assert (codec.template.frames, config.vision.max_frames) == (64, 512)
    prefix = codec.build_prefix(config.num_visual_tokens(2))
    assert list(prefix[: config.visual_offset]).count(codec.pad_id) == 0
    assert prefix[config.visual_offset] == codec.pad_id
    text = codec.tokenizer.decode(prefix[: config.visual_offset].tolist(), False)
    assert text.endswith("<|im_end|>\n<|im_start|>user\n")
    files = export_family(tmp_path / "model", tmp_path / "out", source)
    assert "generation_config.json" in files
    assert codec.stop_ids == (codec.eos_id, codec.pad_id)
    name = "generation_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    same_tensors(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_the_folder_of_the_video_processor_goes_back_out(tmp_path):
    """There `transformers` 4.45 to 4.51 says how videos become pixels, and `import` reads it."""
    source, name = tmp_path / "source", "video_processor/preprocessor_config.json"
    (source / "video_processor").mkdir(parents=True)
    write_published(source, sized(LLAVA_ONEVISION))
    (source / name).write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3]}))
    import_family(source, tmp_path / "model")
    assert "video_processor" in export_family(tmp_path / "model", tmp_path / "out", source)
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    import_family(tmp_path / "out", tmp_path / "again")
    assert folder.load_config(tmp_path / "again").vision.mean == (0.5, 0.4, 0.3)


def test_commands_show_as_many_frames_as_the_checkpoint_says(model):
    config, params, codec = folder.load_model(model)
    predictor = Predictor(config, params, codec, prompt_tokens=16, batch_size=1, max_new=1)
    assert predictor.builder("video", 0).bucket.frames == predictor.frames == 64
    assert Evaluator(config, {}, codec, Settings())._clip_frames("video") == 64
    assert shown_frames(codec, config, 8) == 8
    with pytest.raises(UserError, match="--frames=513: the model takes at most 512"):
        shown_frames(codec, config, 513)
    own = TextCodec(codec.tokenizer, dataclasses.replace(codec.template, frames=0))
    assert shown_frames(own, config) == 512


def test_an_export_replaces_an_export_whole_and_nothing_else(model, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    files = export_family(model, out, source)
    assert export_family(model, out, source) == files
    published = tmp_path / "published"  # the layout of an export, though nobody's here
    shutil.copytree(source, published)
    with pytest.raises(OutputError, match="published: holds files and is no export"):
        export_family(model, published, source)
    with pytest.raises(OutputError, match="published: is, holds or lies in"):
        export_family(model, published, published)
    with pytest.raises(OutputError, match="published: holds files and is no model folder"):
        import_family(source, published)
    monkeypatch.setattr(huggingface, "side_files", lambda _: 1 / 0)  # after the weights
    with pytest.raises(ZeroDivisionError):
        export_family(model, out, source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "published"]
    assert sorted(path.name for path in out.iterdir()) == files
    assert sorted(p.name for p in published.iterdir()) == sorted(p.name for p in source.iterdir())


def test_a_trained_model_goes_back_out(model, source, tmp_path):
    """Its tokenizer has fewer ids than the published table has rows; training keeps them all."""
    config = llava_video_config(model)
    model_config, codec = make_model_config(config)
    assert codec.vocab_size < model_config.language.num_tokens == 320
    _, params, _ = folder.load_model(model)
    table = params["language"]["lm_head"]["kernel"] = params["language"]["lm_head"]["kernel"] + 1
    table[:, 320:] = 0  # beyond num_tokens there is no gradient
    folder.save_model(tmp_path / "trained", model_config, params, codec)
    export_family(tmp_path / "trained", tmp_path / "out", source)
    theirs, ours = read_tensors(source), read_tensors(tmp_path / "out")
    assert theirs.keys() == ours.keys()
    for name in theirs:
        same = np.asarray(theirs[name]).tobytes() == np.asarray(ours[name]).tobytes()
        assert same == (name != "lm_head.weight"), name
    head = np.asarray(theirs["lm_head.weight"]) + 1
    np.testing.assert_array_equal(np.asarray(ours["lm_head.weight"]), head)


@pytest.mark.parametrize("family", ["llava_qwen", "video_llava"])
def test_training_starts_from_the_published_folder_as_from_the_imported(family, source, tmp_path):
    if family == "video_llava":
        source = tmp_path / "published"
        source.mkdir()
        write_published(source, sized(VIDEO_LLAVA))
    import_family(source, tmp_path / "model")
    starts = {}
    for name, path in (("published", source), ("imported", tmp_path / "model")):
        model_config, codec = make_model_config(llava_video_config(path))
        abstract = FunctionalModel(model_config).abstract()
        loaded = folder.load_into(abstract, path)
        assert not loaded.missing and not folder.holds_language_only(path)
        starts[name] = model_config, codec.template, codec.tokenizer.to_str(), loaded.leaves
    *published, theirs = starts["published"]
    *imported, ours = starts["imported"]
    assert published == imported
    assert theirs.keys() == ours.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


SILENT = {
    "llava_onevision": (LLAVA_ONEVISION, {"frames_upbound": 16}),
    "llava_qwen": (LLAVA_VIDEO, {"conv_template": "qwen_1_5", "mm_newline_position": "frame"}),
}  # fmt: skip


@pytest.mark.parametrize("family", SILENT)
def test_training_is_told_what_the_published_folder_does_not_say(family, tmp_path):
    """As `import --set` is; neither folder is changed."""
    data, options = SILENT[family]
    source = tmp_path / "published"
    source.mkdir()
    write_published(source, sized(data))
    said = {name: value for name, value in sized(data).items() if name not in options}
    (source / "config.json").write_text(json.dumps(said))
    config = llava_video_config(source)
    config.trainable = [[".*", 1e-5]]
    with pytest.raises(FamilyError, match=f"{next(iter(options))}.*train: config.init_options"):
        make_model_config(config)
    import_family(source, tmp_path / "model", options)
    starts = {}
    for path, said in ((source, options), (tmp_path / "model", {})):
        config.init_from, config.init_options = str(path), said
        validate(config)
        model_config, codec = make_model_config(config)
        program = make_program(config, model_config, make_mesh({}, jax.devices()[:1]))
        params = flatten(initial_params(config, program, model_config, print))
        starts[path.name] = model_config, codec.template, params
        checked = DryRun(config, "", "", print)
        checked._model()
        assert checked._init_from() == f"{path} has {len(params)} leaves"
    *published, theirs = starts["published"]
    *imported, ours = starts["model"]
    assert published == imported and theirs.keys() == ours.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert (codec.template.frames, model_config.connector.newline) == {
        "llava_onevision": (16, "one_token"), "llava_qwen": (64, "frame")}[family]  # fmt: skip


def test_a_folder_that_says_everything_is_told_nothing(model, source):
    config = llava_video_config(model)
    config.init_options = {"frames_upbound": 16}
    with pytest.raises(UserError, match="init_options=.*'frames_upbound': 16.* not the published"):
        make_model_config(config)
    config.init_from, config.init_options = str(source), {"frames_upbond": 16}
    with pytest.raises(FamilyError, match="frames_upbond .train: config.init_options.: nothing"):
        make_model_config(config)


def test_in_and_out_again_in_a_bucket(source, tmp_path, monkeypatch, capsys):
    gcs_server.install(monkeypatch)
    monkeypatch.chdir(tmp_path)  # where a gs:// path that is taken for a local one would end
    bucket = epath.Path("gs://bucket")
    gcs_server.put(source, bucket / "published")
    published, model, out = (f"gs://bucket/{name}" for name in ("published", "model", "out"))
    for command in (
        ["import", f"--source={published}", f"--out={model}"],
        ["export", f"--model={model}", f"--out={out}", f"--like={published}"],
    ):
        monkeypatch.setattr(sys, "argv", ["convert", *command])
        assert convert.main() == 0
    names = {path.name for path in (bucket / "published").iterdir()}
    assert names == {path.name for path in (bucket / "out").iterdir()}
    for name in names - {"model.safetensors"}:
        assert (bucket / "out" / name).read_bytes() == (source / name).read_bytes(), name
    same_tensors(source, bucket / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["convert", "check", f"--model={model}", f"--exported={out}"])
    with pytest.raises(SystemExit):
        convert.main()
    assert "--exported: gs://bucket/out: expected a path on this mach" in capsys.readouterr().err


def test_a_plan_has_the_prefix_of_the_rows_that_train_gets(model):
    """The sentence about times of a LLaVA-Video checkpoint, as its own config plans it."""
    config = llava_video_config(model)
    validate(config)
    model_config, codec = make_model_config(config)
    (planned,) = read_buckets(config.buckets.to_dict(), codec)
    prefix = batch_spec(planned, model_config)["prefix_tokens"].shape[1]
    rows = row_builder(codec, model_config, Bucket.from_config("video", config.buckets.video))
    visual = model_config.visual_offset + model_config.num_visual_tokens(planned.frames)
    assert prefix == rows.prefix_tokens == visual + 1 + codec.time_room(planned.frames)
    assert codec.time_room(planned.frames) > 50
    config = llava_video_config()  # without weights: the same sentence, by another tokenizer
    assert make_model_config(config)[1].template.time_instruction


def test_another_models_folder_is_refused(model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(DATA | {"mm_spatial_pool_mode": "bilinear"}))
    with pytest.raises(FamilyError, match="connector is .*average.*bilinear"):
        export_family(model, tmp_path / "out", other)


def test_an_option_completes_config_json(source, tmp_path):
    silent = tmp_path / "silent"
    silent.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (silent / name).write_bytes((source / name).read_bytes())
    data = dict(DATA)
    del data["mm_newline_position"]
    (silent / "config.json").write_text(json.dumps(data))
    with pytest.raises(FamilyError, match="does not say mm_newline_position"):
        import_family(silent, tmp_path / "model")
    import_family(silent, tmp_path / "model", {"mm_newline_position": "frame"})
    assert folder.load_config(tmp_path / "model").connector.newline == "frame"


def test_an_option_that_nothing_reads_is_refused(model, source, tmp_path):
    typo = {"mm_spatial_pool_mod": "max"}
    read = (r"--set mm_spatial_pool_mod \(train: config.init_options\): nothing reads it in this "
            "llava_qwen; .*'frames_upbound'")  # fmt: skip
    with pytest.raises(FamilyError, match=read):
        import_family(source, tmp_path / "model", typo)
    with pytest.raises(FamilyError, match="--set mm_spatial_pool_mod"):
        export_family(model, tmp_path / "out", source, typo)
    read_by_all = {"rope_theta": 1e6, "frames_upbound": 16, "faster_token_stride": 10,
                   "add_faster_video": False}  # fmt: skip
    off = r"--set faster_token_stride \(train: config.init_options\): nothing"
    with pytest.raises(FamilyError, match=off):
        read_config(source, read_by_all)
    read_config(source, read_by_all | {"add_faster_video": True})


def test_a_tower_that_crops_is_imported_to_stretch_for_heads(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_published(source, sized(LONGVA))
    import_family(source, tmp_path / "cropped")
    with pytest.raises(UserError, match="resize='crop' does not show; .* --set resize=stretch"):
        dataclasses.replace(folder.load_config(tmp_path / "cropped"), heads=("region",))
    whole = {"resize": "stretch"}
    import_family(source, tmp_path / "model", whole)
    config = dataclasses.replace(folder.load_config(tmp_path / "model"), heads=("region",))
    assert config.vision.resize == "stretch"
    export_family(tmp_path / "model", tmp_path / "out", source, whole)
    with pytest.raises(UserError, match="vision.resize='shrink': use one of"):
        import_family(source, tmp_path / "other", {"resize": "shrink"})


def test_options_are_json_or_text():
    assert option("mm_spatial_pool_stride=2") == ("mm_spatial_pool_stride", 2)
    assert option("mm_spatial_pool_mode=average") == ("mm_spatial_pool_mode", "average")
    with pytest.raises(ValueError, match="expected OPTION=VALUE"):
        option("average")


def test_only_known_folders_are_families(source, tmp_path):
    assert is_family(source) and not is_family(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LONGVA | {"model_type": "qwen2"}))
    assert not is_family(tmp_path)
