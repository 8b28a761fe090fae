import copy

import jax

from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training import agreement


def identity():
    return {"code": "1+a", "libraries": {"jax": "0.10"}, "random": {"implementation": "threefry"},
            "data": {"train": "aa", "validation": "bb"}}  # fmt: skip


def test_the_odd_one_out_is_named_with_both_values():
    shown = [{"code": "a", "mesh": "m"}, {"code": "a", "mesh": "m"}, {"code": "b", "mesh": "m"}]
    assert agreement.differences(shown[:2]) == []
    assert agreement.differences(shown) == ["process 2: code is b, the others have a"]
    del shown[0]["mesh"]
    assert "process 0: mesh is nothing, the others have m" in agreement.differences(shown)
    # Of two, the first is taken to be right.
    assert agreement.differences(shown[1:]) == ["process 1: code is b, the others have a"]


def test_facts_cover_config_mesh_code_and_data():
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    one = agreement.facts({"seed": 0, "steps": 5}, mesh, identity())
    changed = [
        agreement.facts({"seed": 1, "steps": 5}, mesh, identity()),
        agreement.facts({"seed": 0, "steps": 5}, make_mesh({"fsdp": 2}, jax.devices()[:2]),
                        identity()),
        agreement.facts({"seed": 0, "steps": 5}, mesh, identity() | {"code": "1+b"}),
        agreement.facts({"seed": 0, "steps": 5}, mesh,
                        identity() | {"data": {"train": "ab", "validation": "bb"}}),
    ]  # fmt: skip
    names = [{k for k in one if one[k] != other[k]} for other in changed]
    assert names == [{"config.seed"}, {"mesh"}, {"code"}, {"data: train"}]


def test_data_and_code_have_digests(tmp_path):
    (tmp_path / "prepared.json").write_text("{}")
    (tmp_path / "index.jsonl").write_text("a\n")
    (tmp_path / "pairs.jsonl").write_text("p\n")
    source = {"path": str(tmp_path), "pairs": str(tmp_path / "pairs.jsonl")}
    mesh = make_mesh({}, jax.devices()[:1])
    first = agreement.identity([source], mesh)
    assert set(first["data"]) == {str(tmp_path), str(tmp_path / "pairs.jsonl")}
    (tmp_path / "index.jsonl").write_text("b\n")
    second = agreement.identity([source], mesh)
    assert first["code"] == second["code"] and "+" in first["code"]
    differing = {path for path in first["data"] if first["data"][path] != second["data"][path]}
    assert differing == {str(tmp_path)}


def test_other_data_or_random_settings_forbid_other_code_is_told():
    now = identity()
    assert agreement.changes(identity(), now) == ([], [])
    now["data"] = {"train": "changed", "new": "cc"}  # "validation" went, "new" came
    now["random"] = {"implementation": "rbg"}
    now["code"] = "1+b"
    before = copy.deepcopy(now)
    forbids, told = agreement.changes(identity(), now)
    assert len(forbids) == 2 and "random: implementation" in forbids[0]
    assert "data: train: checkpoint has aa, this command has changed" in forbids[1]
    assert told == ["code: checkpoint has 1+a, this command has 1+b"] and now == before


def test_another_kind_of_device_and_another_mesh_are_told():
    one, two = (agreement.identity([], make_mesh({"fsdp": n}, jax.devices()[:n])) for n in (1, 2))
    saved = one | {"device": "TPU v4"}
    assert agreement.changes(saved, saved) == ([], [])
    assert agreement.changes(saved, two) == ([], [
        "device: checkpoint has TPU v4, this command has cpu",
        "mesh: checkpoint has data 1, fsdp 1, context 1, tensor 1, "
        "this command has data 1, fsdp 2, context 1, tensor 1",
    ])  # fmt: skip
    older = identity()  # of a checkpoint that says neither
    assert agreement.changes(older, older | {"device": "cpu", "mesh": "data 2"}) == ([], [])
