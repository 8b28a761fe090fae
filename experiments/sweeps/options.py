"""Options of a config by path: "optimizer.clip", "trainable[0][1]", "data.train[0].tasks.region".

The paths are those that errors about a config use.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tpo_jax.training.config import ConfigError

_PART = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def parse(path: str) -> list[str | int]:
    """"trainable[0][1]" -> ["trainable", 0, 1].

    Raises:
      ConfigError: not a path.
    """
    parts = [name or int(index) for name, index in _PART.findall(path)]
    if not parts or isinstance(parts[0], int) or join(parts) != path:
        raise ConfigError(f"option {path!r}: expected a path such as optimizer.clip or losses[0]")
    return parts


def join(parts: Sequence[str | int]) -> str:
    """The inverse of `parse`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")


def get(config: Any, path: str) -> Any:
    """The value at a path of a config or of plain dicts and lists.

    Raises:
      ConfigError: no such option; names the part that is missing and what is there.
    """
    value, seen = config, []
    for part in parse(path):
        value = _step(value, part, path, seen)
        seen.append(part)
    return value


def put(config: ConfigDict, path: str, value: Any) -> None:
    """Sets an option that exists. A FieldReference changes all that was computed from it.

    Raises:
      ConfigError: no such option, or a value of another type.
    """
    *parents, last = parse(path)
    _own_lists(config, parents)
    owner = get(config, join(parents)) if parents else config
    old = _step(owner, last, path, parents)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(old) is not type(value) and not (_is_list(old) and _is_list(value)) and not (
        isinstance(old, Mapping | ConfigDict) and isinstance(value, Mapping)
    ):
        raise ConfigError(
            f"{path} = {value!r}: is a {type(value).__name__}, the config has {old!r}; "
            f"give a {type(old).__name__}"
        )
    owner[last] = value


def leaves(value: Any, parts: Sequence[str | int] = ()) -> Iterator[tuple[str, Any]]:
    """(path, value) of every number, text or empty container in plain dicts and lists."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, (*parts, key))
    elif _is_list(value) and value:
        for index, item in enumerate(value):
            yield from leaves(item, (*parts, index))
    else:
        yield join(parts), value


def _own_lists(config: ConfigDict, parts: Sequence[str | int]) -> None:
    """Copies the outermost list on the way: a config file may have given it to several configs."""
    owner: Any = config
    for depth, part in enumerate(parts):
        value = _step(owner, part, join(parts), parts[:depth])
        if _is_list(value):
            owner[part] = copy.deepcopy(value)
            return
        owner = value


def _step(value: Any, part: str | int, path: str, seen: Sequence[str | int]) -> Any:
    """One level down."""
    at = join(seen) or "the config"
    if isinstance(part, int):
        if not _is_list(value) or part >= len(value):
            raise ConfigError(f"option {path!r}: {at} has no entry {part}; it is {value!r}")
        return value[part]
    if not isinstance(value, Mapping | ConfigDict) or part not in value:
        known = ", ".join(value) if isinstance(value, Mapping | ConfigDict) else repr(value)
        raise ConfigError(f"option {path!r}: {at} has no option {part!r}; it has {known}")
    return value[part]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
