import dataclasses

import micro_model
import numpy as np
import pytest

from tpo_jax.data.text import TextCodec, train_tokenizer
from tpo_jax.models.presets import preset
from tpo_jax.training import sidecar

FINGERPRINT = sidecar.Fingerprint(
    weights="w", model="m", tokenizer="t", template="c", preprocessing="p", bucket="b",
    dtype="float32", attention="dense")


def make(ids, fingerprint=FINGERPRINT):
    logps = {i: np.full((2, 3), float(n), np.float32) for n, i in enumerate(ids)}
    return sidecar.Sidecar(fingerprint, {i: f"digest-{i}" for i in ids}, logps)


def test_write_read_is_identity(tmp_path):
    sidecar.write(tmp_path / "ref.npz", make(["b", "a"]))
    back = sidecar.read(tmp_path / "ref.npz", FINGERPRINT)
    np.testing.assert_array_equal(back.lookup("b", "digest-b"), np.zeros((2, 3)))
    np.testing.assert_array_equal(back.lookup("a", "digest-a"), np.ones((2, 3)))
    assert [p.name for p in tmp_path.iterdir()] == ["ref.npz"]


def test_pairs_have_rows_of_their_own_number(tmp_path):
    scored = make(["a", "b"])
    logps = scored.logps | {"b": np.arange(8, dtype=np.float32).reshape(4, 2)}
    sidecar.write(tmp_path / "ref.npz", dataclasses.replace(scored, logps=logps))
    back = sidecar.read(tmp_path / "ref.npz", FINGERPRINT)
    np.testing.assert_array_equal(back.lookup("a", "digest-a", 3), np.zeros((2, 3)))
    np.testing.assert_array_equal(back.lookup("b", "digest-b", 2), logps["b"])


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(sidecar.Fingerprint)])
def test_each_changed_condition_refuses_and_names_both_sides(tmp_path, field):
    sidecar.write(tmp_path / "ref.npz", make(["a"]))
    other = dataclasses.replace(FINGERPRINT, **{field: "changed"})
    with pytest.raises(sidecar.SidecarMismatch) as error:
        sidecar.read(tmp_path / "ref.npz", other)
    message = str(error.value)
    assert field in message and "'changed'" in message
    assert repr(getattr(FINGERPRINT, field)) in message and "ref.npz" in message


def test_changed_or_unknown_pair_refuses():
    scored = make(["a"])
    with pytest.raises(sidecar.SidecarMismatch, match="digest-a.*digest-b"):
        scored.lookup("a", "digest-b")
    with pytest.raises(sidecar.SidecarMismatch, match="'z' was never scored"):
        scored.lookup("z", "digest-z")


def test_missing_file_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="preferences score"):
        sidecar.read(tmp_path / "none.npz")


def test_older_sidecars_hold_however_the_model_runs():
    """The hash is of the format in which the model said its kernel, and `remat` was a bool."""
    codec = TextCodec(train_tokenizer(["a red square"], 270))
    for remat in ("", "dots"):
        config = preset("micro").running(attention="auto", remat=remat)
        found = sidecar.Fingerprint.of(config, {}, codec, 8)
        assert found.model == "16493dc3e0db1db6b8970e6ef8ebd04ad764fc45dd734ba93cca4c1fc16938b1"
        assert found.attention == "xla"
    large = sidecar.Fingerprint.of(preset("llava_video_7b"), {}, codec, 8, platform="tpu")
    assert large.model == "4dde725f098979ffc9a6cc7f7e5c1884781fd244ba386bafeb4ca0e01876aa3c"
    assert large.attention == "splash"


def test_the_kernel_is_that_of_the_devices_and_of_how_many_share_a_row():
    codec = TextCodec(train_tokenizer(["a red square"], 270))
    gpus = {devices: sidecar.Fingerprint.of(preset("llava_video_7b"), {}, codec, 8, platform="gpu",
                                            context=devices) for devices in (1, 2)}
    assert {devices: found.attention for devices, found in gpus.items()} == {1: "cudnn", 2: "xla"}
    assert gpus[1].model != gpus[2].model


def test_merge_joins_and_refuses_twice_and_mixed_conditions():
    joined = sidecar.merge([make(["a"]), make(["b", "c"])])
    assert sorted(joined.logps) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="'a' was already scored"):
        sidecar.merge([make(["a"]), make(["a", "b"])])
    with pytest.raises(sidecar.SidecarMismatch, match="bucket"):
        sidecar.merge([make(["a"]), make(["b"], dataclasses.replace(FINGERPRINT, bucket="x"))])


def test_row_digest_sees_frames_their_times_and_token_boundaries():
    frames, stored = np.array([[1, 0.5], [2, 1.0]]), "32 x 48 raw"
    row = sidecar.hash_row(frames, stored, np.array([1, 2]), np.array([3]))
    assert row == sidecar.hash_row(frames, stored, np.array([1, 2], np.int64), np.array([3]))
    assert row != sidecar.hash_row([[1, 0.5], [3, 1.0]], stored, np.array([1, 2]), np.array([3]))
    assert row != sidecar.hash_row([[1, 0.5], [2, 1.5]], stored, np.array([1, 2]), np.array([3]))
    assert row != sidecar.hash_row(frames, stored, np.array([1]), np.array([2, 3]))
    # Padding at the end is not part of a row, inside it is.
    assert row == sidecar.hash_row(frames, stored, np.array([1, 2, 0, 0]), np.array([3, 0]))
    assert row != sidecar.hash_row(frames, stored, np.array([1, 0, 2]), np.array([3]))
    for other in ("32 x 48 jpeg", "32 x 32 raw"):
        assert row != sidecar.hash_row(frames, other, np.array([1, 2]), np.array([3]))


def test_a_sidecar_of_an_older_format_is_refused_by_name(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sidecar, "FORMAT_VERSION", 2)
        sidecar.write(tmp_path / "ref.npz", make(["a"]))
    with pytest.raises(sidecar.SidecarMismatch, match="ref.npz: format_version 2, expected 3"):
        sidecar.read(tmp_path / "ref.npz")


def test_lookup_pads_to_the_bucket_and_refuses_a_shorter_one():
    scored = make(["a", "b"])
    wide = scored.lookup("b", "digest-b", 5)
    assert wide.shape == (2, 5) and wide.sum() == 6
    with pytest.raises(sidecar.SidecarMismatch, match="3 tokens.*answers = 2"):
        scored.lookup("b", "digest-b", 2)


def test_fingerprint_ignores_dropout_and_sees_weights_and_frames():
    codec = micro_model.make_codec()
    model = micro_model.make_model(codec)
    params = micro_model.make_params(model)
    make_print = sidecar.Fingerprint.of
    base = make_print(model.config, params, codec, 8)
    language = dataclasses.replace(model.config.language, dropout=0.1)
    dropped = dataclasses.replace(model.config, language=language)
    assert make_print(dropped, params, codec, 8) == base
    shown = TextCodec(codec.tokenizer, dataclasses.replace(
        codec.template, frames=8, stops=("<bos>",)))
    assert make_print(model.config, params, shown, 8) == base
    assert make_print(model.config, params, codec, 4).bucket != base.bucket
    table = params["language"]["embed"]["table"].at[0, 0].add(1.0)
    other = {**params, "language": {**params["language"], "embed": {"table": table}}}
    assert make_print(model.config, other, codec, 8).weights != base.weights
    theta = dataclasses.replace(model.config.language, rope_theta=1e6)
    assert make_print(dataclasses.replace(model.config, language=theta), params, codec,
                      8).model != base.model
