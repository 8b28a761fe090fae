"""The command that plans all configs, on their tiny shapes."""

import dataclasses
import importlib.util
import json
import pathlib
import types

import pytest

from experiments import assigned_memory, plan_table, plans
from tpo_jax.parallel.topologies import GIB, parse_topology
from tpo_jax.training import estimate

pytestmark = [
    pytest.mark.plan,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra `plan`)"
    ),
]
RESULTS = pathlib.Path(plans.__file__).parent / "results" / "plans"
VMEM = 128 * 2**20  # of a chip, which the total of the assignment counts as well
CELLS = [
    plans.Cell("longva_tpo", "", "v5e:1x1", trained="lora"),
    plans.Cell("longva_tpo", "", "v5e:2x2", trained="lora"),
]


def test_every_cell_has_a_config_a_mesh_and_a_name_of_its_own():
    found = plans.cells()
    assert len({cell.name for cell in found}) == len(found) > 100
    for cell in {c.group[:2]: c for c in found}.values():
        assert plans.cell_config(cell).buckets
    planned = {cell.config for cell in found}
    small = {"demo", "task_preference", "temporal_preference", "tiny_base", "prepare"}
    assert planned == {path.stem for path in plans.CONFIGS.glob("*.py")} - small
    assert plans.mesh_of(256, 256) == {"data": 2, "fsdp": 128, "context": 1, "tensor": 1}
    assert plans.mesh_of(64, 128, most=32) == {"data": 2, "fsdp": 32, "context": 1, "tensor": 1}
    assert plans.mesh_of(256, 64) == {"data": 1, "fsdp": 64, "context": 1, "tensor": 4}
    assert plans.mesh_of(256, 64, 4) == {"data": 1, "fsdp": 64, "context": 4, "tensor": 1}
    assert plans.mesh_of(64, 64, 4) == {"data": 1, "fsdp": 16, "context": 4, "tensor": 1}
    assert plans.contexts(1, 32) == [2, 4, 8, 16] and plans.contexts(4, 24) == [8]


@pytest.mark.parametrize("config", ["videochat_tpo", "llava_onevision_tpo"])
def test_the_stage_that_is_left_out_has_the_programs_of_another(config):
    """How often a bucket comes apart: what is compiled reads neither steps nor data."""
    left_out, planned = (
        plans.cell_config(plans.Cell(config, f"stage={stage},random", "v5e:8x8")).to_dict()
        for stage in ("3_tasks", "3")
    )
    for stage in (left_out, planned):
        del stage["data"], stage["steps"]
        for bucket in stage["buckets"].values():
            del bucket["weight"]
    assert left_out == planned
    args = {cell.arg for cell in plans.cells() if cell.config == config}
    assert "stage=3,random" in args and "stage=3_tasks,random" not in args


def step_of(memory: float, rows: int) -> estimate.Estimate:
    """Of `memory` GiB a row, on one chip."""
    zero = estimate.Linear(0, 0, rows)
    return estimate.Estimate(
        state=GIB, batch=0, temporaries=estimate.Linear(rows * memory * GIB, memory * GIB, rows),
        flops=zero, products=zero, sent={}, model_flops=1, chips=1, row_chips=1, rows=8,
        accumulation=8 // rows,
    )  # fmt: skip


def test_micro_batches_are_as_few_as_let_all_buckets_fit():
    steps = {"video": step_of(3, 1), "image": step_of(1, 1)}
    for name, count in (("image", 1), ("video", 2)):
        found = plans.fewest_micro_batches({name: steps[name]}, 1, 8, 14 * GIB)
        assert found[name].accumulation == count
    for least, count in ((1, 2), (3, 4)):
        found = plans.fewest_micro_batches(steps, least, 8, 14 * GIB)
        assert [found[name].accumulation for name in steps] == [count, count]
    assert plans.fewest_micro_batches(steps, 1, 8, 2 * GIB) == steps


def test_where_the_compiler_finds_no_room_more_micro_batches_are_tried(monkeypatch, tmp_path):
    """Until they fit, or each has one row of a chip."""
    planner, cell = plans.Planner(tiny=True), plans.Cell("longva_tpo", "", "v5e:1x1", "lora")
    (chip, _), said = parse_topology(cell.topology), []

    def assign(cell, out):
        count = json.loads((out / "plans.json").read_text())[cell.name]["estimate"]["accumulation"]
        said.append(count)
        return assigned_memory.Assigned(chip.hbm + (1 if count < enough else 0), "ENTRY", 1.0)

    monkeypatch.setattr(planner, "assign", assign)
    for enough, tried in ((2, [1, 2]), (9, [1, 2, 4])):
        said.clear()
        results = plans.run(tmp_path, [cell], 0, planner, fresh=True)
        assert said == tried and plan_table.fits(results[cell.name]) == (enough == 2)
        assert plans.run(tmp_path, [cell], 0, planner) == results and said == tried


def test_a_cell_with_steps_of_two_buckets_is_the_larger_and_has_the_hours_of_both():
    cell = plans.Cell("videochat2", "", "v5e:1x1")
    planned = plans.Planner(tiny=True).plan(cell)
    record = plans.estimated(planned, cell)
    assert record["bucket"] == "video" and record["others"].keys() == {"image"}
    image = record["others"]["image"]
    assert image["memory"] < record["memory"]
    config = plans.cell_config(cell, tiny=True)
    assert config.steps == record["steps"] + image["steps"] == 3
    record |= {"steps": 3600, "others": {"image": image | {"steps": 7200, "seconds": 2.5}}}
    record["roofline"] |= {"compute": 1.0, "hbm": 0.5, "ici": 0.5}
    row = plan_table.page({cell.name: {"estimate": record}})
    assert "| 6 (3,600 video, 7,200 image at 2.50 s) |" in row


@pytest.mark.parametrize(
    ("state", "activations", "chosen", "tried"),
    [
        (2, 10, 1, [1]),
        (2, 20, 2, [1, 2]),
        # Two chips need at least 2 + 20 of 16, four 4 + 10.
        (1, 40, 4, [1, 4]),
        # The state grows as fast as activations shrink: nothing else can fit.
        (12, 12, 1, [1]),
    ],
)
def test_as_few_chips_share_a_row_as_let_it_fit(monkeypatch, state, activations, chosen, tried):
    seen = []

    def fake(self, cell, sizes):
        seen.append(context := sizes["context"])
        linear = estimate.Linear(activations / context * GIB, 0, 1)
        one = types.SimpleNamespace(
            state=state * context * GIB, temporaries=linear,
            memory=(state * context + activations / context) * GIB,
        )  # fmt: skip
        return types.SimpleNamespace(estimate=one, mesh=types.SimpleNamespace(shape=sizes))

    monkeypatch.setattr(plans.Planner, "_plan", fake)
    cell = plans.Cell("longva_tpo", "", "v5e:8x8", frames=64)
    assert plans.Planner().plan(cell).mesh.shape["context"] == chosen
    assert seen == tried


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("plans")
    return out, plans.run(out, CELLS, 1, plans.Planner(tiny=True))


def test_estimates_and_assigns_and_goes_on_where_it_stopped(found):
    out, results = found
    assert [set(result) for result in results.values()] == [{"estimate", "assigned"}] * 2
    stored = json.loads((out / "plans.json").read_text())
    assert stored == results
    again = plans.run(out, CELLS, 0, None)  # nothing is planned anew
    assert again == results
    text = (out / "README.md").read_text()
    assert text.count("| assigned |  |") == 2 and "Median ratio" in text


def test_what_is_estimated_and_assigned_is_near_what_is_compiled(found):
    """Tiny shapes are mostly padding to tiles, so the estimate is not very near."""
    result = found[1][CELLS[1].name]
    made = plans.compiled(plans.Planner(tiny=True).compile(CELLS[1], result["estimate"]))
    assert 0.3 < result["estimate"]["memory"] / made["memory"] < 3
    assert 0 <= result["assigned"]["memory"] - made["memory"] <= VMEM
    assert result["assigned"]["collectives"] == made["collectives"] != {}
    rows = plan_table.page({CELLS[1].name: result | {"compiled": made}})
    assert f"| compiled | {made['seconds']} |" in rows and "Assigned against compiled" in rows
    refused = plan_table.page({CELLS[1].name: result | {"compiled": made | {"ran_out": True}}})
    assert f"| **no** | refused by the compiler | {made['seconds']} |" in refused
    assert "1 cells: 0 compiled, 1 refused by the compiler, 0 assigned, 0 estimated." in refused


def test_more_chips_hold_more_rows_in_less_time(found):
    one, four = (found[1][cell.name]["estimate"] for cell in CELLS)
    assert one["state"] > 2 * four["state"] and one["flops"] == four["flops"]
    # Recomputation apart, the products are those that a step needs.
    chip, _ = parse_topology("v5e:1x1")
    assert 0.5 < one["flops"] / (one["roofline"]["compute"] * chip.peak) <= 1
    assert one["roofline"]["compute"] == pytest.approx(4 * four["roofline"]["compute"], rel=0.01)
    assert not one["sent"].get("all-gather") and four["sent"]["all-gather"] > 0


def test_chips_that_share_a_row_hold_less_of_it():
    """Keys and values come from all of them; the state lies on fewer."""
    planner = plans.Planner(tiny=True)
    one, two = (planner._plan(CELLS[1], plans.mesh_of(4, 4, c)).estimate for c in (1, 2))
    assert one.row_chips == 4 and two.row_chips == 2 and two.rows == 2 * one.rows
    assert two.state > 1.5 * one.state and two.model_flops == one.model_flops
    # Of one row; weights and branches are not split.
    assert 0.5 * one.temporaries.slope < two.temporaries.slope < 0.9 * one.temporaries.slope
    assert two.flops.slope == pytest.approx(one.flops.slope / 2)
    assert two.sent["all-gather"] != one.sent["all-gather"]


def made(memory: float, ran_out: bool = False, collectives: int = 1) -> dict:
    kinds = {} if ran_out else {"all-gather": {"count": collectives, "bytes": 1.0}}
    return {"memory": memory * GIB, "seconds": 7, "ran_out": ran_out, "collectives": kinds}


def result(memory: float, compiled: float | None = None) -> dict:
    known = {} if compiled is None else {"compiled": made(compiled)}
    return {"estimate": {"memory": memory * GIB, "hbm": 16 * GIB}} | known


def test_either_side_of_a_boundary_is_compiled_nearest_first():
    cells = [dataclasses.replace(CELLS[0], frames=frames) for frames in (32, 64, 128, 256)]
    alone = plans.Cell("longva", "", "v5e:8x8")
    memory = dict(zip([c.name for c in cells], (4, 12, 17, 30), strict=True)) | {alone.name: 15.9}
    results = {name: result(value) for name, value in memory.items()}
    assert plans.boundaries(results, [*cells, alone]) == [cells[2], cells[1]]
    results[cells[2].name]["assigned"] = {"memory": 14 * GIB, "ran_out": False}
    assert plans.boundaries(results, [*cells, alone]) == [cells[2], cells[3]]
    results[cells[2].name] = result(17, 16.5)
    assert plans.boundaries(results, [*cells, alone]) == [cells[1]]
    assert not plan_table.fits(results[cells[2].name])


def test_what_fits_by_less_than_the_error_of_assignments_is_compiled():
    cells = [plans.Cell("longva", "", pod) for pod in ("v4:2x2x4", "v5e:8x8", "v5e:16x16")]
    known, narrow, wide = (cell.name for cell in cells)
    results = {
        known: result(5, 10) | {"assigned": made(9)},  # nine tenths of the finished program
        narrow: result(5) | {"assigned": made(14.5)},
        wide: result(5) | {"assigned": made(14.3)},
    }
    assert plan_table.sure_share(results) == pytest.approx(0.9)
    assert plans.boundaries(results, cells) == [cells[1]]
    assert f"`yes` are such: {narrow}." in plan_table.errors(results)[-1]
    assert plans.boundaries(results | {narrow: result(5, 15) | results[narrow]}, cells) == []
    # Without an error that is known, and where assignments were above it alone.
    del results[known]["compiled"]
    assert plans.boundaries(results, cells) == []
    results[known] |= result(5, 8)
    assert plan_table.sure_share(results) == 1 and plans.boundaries(results, cells) == []


def test_after_each_compiled_cell_boundaries_are_looked_for_anew(monkeypatch, tmp_path):
    """The first is refused, so memory ends below it and not above."""
    cells = [dataclasses.replace(CELLS[0], frames=frames) for frames in (32, 64, 128)]
    memory = zip(cells, (10, 15.5, 17), strict=True)
    results = {cell.name: result(5) | {"assigned": made(size)} for cell, size in memory}
    (tmp_path / "plans.json").write_text(json.dumps(results))
    asked = []

    def compile(cell, estimate):
        asked.append(cell.frames)
        return plans.plan.ProgramPlan(None, 1.0, None, 20 * GIB, {})

    planner = types.SimpleNamespace(compile=compile, split_more=lambda cell, estimate: None)
    monkeypatch.setattr(plans, "save", lambda out, results: None)
    plans.run(tmp_path, cells, 5, planner)
    assert asked == [64, 32]


def test_a_cell_refused_before_code_is_called_so():
    records = json.loads((RESULTS / "plans.json").read_text())
    name, record = next(iter(records.items()))
    text = plan_table.page({name: {**record, "assigned": made(40, ran_out=True)}})
    assert "| **no** | refused by the compiler |  |" in text
    assert "1 cells: 0 compiled, 1 refused by the compiler, 0 assigned, 0 estimated." in text


def test_the_error_of_assignments_is_told_from_what_was_compiled():
    """A refusal is the same error twice; other collectives are those of another program."""

    def both(one, other):
        return {**result(5), "assigned": one, "compiled": other}

    same = {"a": both(made(10.5), made(10)), "b": both(made(10.25), made(10))}
    results = same | {"refused": both(*[made(20, ran_out=True)] * 2)}
    found = "\n".join(plan_table.errors(results))
    assert "Of 2 cells that are both, assigned less compiled is +0.25 to +0.50 GiB;" in found
    assert "| a | 10.50 | 10.00 | 1.050 | yes |" in found and "other collectives" not in found
    assert found.endswith("Assigned was never less than compiled: what fits by it is taken to fit.")
    assert "| refused | 20" not in found
    results["late"] = both(made(15.9), made(16.5, ran_out=True))
    assert "| late | 15.90 | 16.50 | 0.964 | refused |" in "\n".join(plan_table.errors(results))
    assert plan_table.sure_share(results) == pytest.approx(15.9 / 16.5)
    del results["late"]
    results["other"] = both(made(8), made(10, collectives=2))
    found = "\n".join(plan_table.errors(results))
    assert "Of 3 cells that are both, assigned less compiled is -2.00 to +0.50 GiB;" in found
    assert "1 of them have other collectives compiled than assigned" in found
    assert "With the same collectives it is +0.25 to +0.50 GiB." in found
    assert "| other | 8.00 | 10.00 | 0.800 | no |" in found
    assert "more than 80.0 % of memory may not fit. 0 cells" in found


def test_the_largest_batch_is_where_memory_ends():
    planned = plans.Planner(tiny=True).plan(CELLS[0])
    chip, _ = parse_topology("v5e:1x1")
    estimate = planned.estimate
    rows = estimate.largest_batch(chip.hbm)
    assert rows > estimate.rows

    def memory(rows):
        return estimate.state + estimate.batch + estimate.temporaries.at(rows)

    assert memory(rows) <= chip.hbm < memory(rows + 1)


def test_the_committed_page_is_that_of_its_records():
    """A cell that fits has room for the micro-batch that it was planned with."""
    text = (RESULTS / "README.md").read_text()
    assert text == plan_table.page(json.loads((RESULTS / "plans.json").read_text()))
    found = (line.strip("| ").split(" | ") for line in text.splitlines())
    lines = [cells for cells in found if len(cells) == len(plan_table._COLUMNS)]
    columns = {name: lines[0].index(name) for name in ("rows a step", "fits", "largest")}
    cells = [[line[column] for column in columns.values()] for line in lines[1:]]
    assert len(cells) > 100
    for rows, good, largest in cells:
        batch, times = map(int, rows.split(" x "))
        assert (int(largest) >= batch // times) if good == "yes" else largest == "0"


@pytest.mark.long
def test_a_full_size_config_fits_its_pod_and_its_estimate():
    """LongVA as published, all of it trained, by the compiler for 64 chips."""
    cell, planner = plans.Cell("longva", "", "v5e:8x8"), plans.Planner()
    estimated = plans.estimated(planner.plan(cell), cell)
    found = planner.compile(cell, estimated)
    assert found.fits(16 * GIB)
    assert 0.7 < found.needed / estimated["memory"] < 1.1
