"""Nested dicts by "/"-joined path, the names that rules, optimizers and files share."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax


def path_str(path: tuple[Any, ...]) -> str:
    """"/"-joined name of a jax key path: ("a", 0, .mu) -> "a/0/mu"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """All leaves of any pytree by path, in tree order."""
    return {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict from "/"-joined paths; the inverse of `flatten` for nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_with_path(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """tree.map where `function` gets the path first: function(path, leaf, *leaves_of_rest)."""
    return jax.tree_util.tree_map_with_path(lambda p, *x: function(path_str(p), *x), tree, *rest)


def first_match(patterns: Iterable[str], path: str) -> int | None:
    """Index of the first pattern that matches `path` from its start, or None.

    Patterns are regular expressions anchored at the start of the path and open at its end:
    "heads/" takes all heads, "language/.*bias" every bias of the language model.
    """
    for index, pattern in enumerate(patterns):
        if re.match(pattern, path):
            return index
    return None
