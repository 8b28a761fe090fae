"""A room imports only from the rooms below it, as README.md draws them."""

import ast
import pathlib

import tpo_jax

PACKAGE = pathlib.Path(tpo_jax.__file__).parent
FLOORS = (
    {"parallel"}, {"objectives", "models"}, {"data"}, {"interop"}, {"training", "generation"},
    {"evaluation"},
)  # fmt: skip
OPEN_TO_ALL = {"errors"}


def imported(file: pathlib.Path) -> set[str]:
    """Rooms and commands of tpo_jax that a file imports from, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "tpo_jax":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tpo_jax."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {
                a.name.split(".")[1] for a in node.names if a.name.startswith("tpo_jax.")
            }  # fmt: skip
    return names - OPEN_TO_ALL


def test_the_rooms_are_all_there():
    assert sorted(set().union(*FLOORS)) == sorted(
        init.parent.name for init in PACKAGE.glob("*/__init__.py")
    )


def test_a_room_imports_only_from_the_rooms_below_it():
    below, wrong = set(), []
    for floor in FLOORS:
        for room in floor:
            for file in (PACKAGE / room).rglob("*.py"):
                found = sorted(imported(file) - below - {room})
                wrong += [f"{file.relative_to(PACKAGE)}: {name}" for name in found]
        below |= floor
    assert not wrong
