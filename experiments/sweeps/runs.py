"""The runs of a sweep: one config each, named by what varies, and how far each has come.

A config file that can be swept has, beside `get_config`,

    def sweep(add):
        for rate in (1e-3, 3e-3):
            for seed in range(3):
                add(seed=seed, **{"trainable[0][1]": rate})

Each `add(**overrides)` is one run. Keys are paths of options (see `options`); they change the
config before anything reads it, so what was computed from them with `config.get_ref` follows. A
second parameter, `sweep(add, arg)`, receives what stands behind the colon of --config.
"""

import dataclasses
import hashlib
import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from experiments.sweeps import options
from tpo_jax.data import files
from tpo_jax.training import config as training_config
from tpo_jax.training.config import ConfigError
from tpo_jax.training.config_changes import changed_since

LONGEST_NAME = 100
EXIT_FILE = "exit_status"  # in a workdir; see launchers


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      name: of its folder.
      workdir: SWEEP/name.
      config: the whole config as JSON.
      varied: {option: value} of the options that differ between the runs.
    """

    name: str
    workdir: epath.Path
    config: Mapping[str, Any]
    varied: Mapping[str, Any]

    @property
    def config_path(self) -> epath.Path:
        return self.workdir / "config.json"


def expand(config_flag: str, out: epath.PathLike) -> list[Run]:
    """The runs that FILE.py[:ARG] asks for, each with a valid config.

    A run that is in `out` already keeps its folder, whatever its name was when it was started.

    Raises:
      ConfigError: no `sweep(add)`, an option that does not exist, a config that is not valid, or
        two runs with one config.
    """
    file, _, arg = config_flag.partition(":")
    module = _load(file)
    overrides = _collect(module, arg, file)
    configs = []
    for index, chosen in enumerate(overrides):
        config = module.get_config(arg) if arg else module.get_config()
        try:
            for path, value in chosen.items():
                options.put(config, path, value)
            training_config.validate(config)
        except ConfigError as error:
            raise ConfigError(f"{file}: sweep, run {index} ({chosen}): {error}") from error
        configs.append(training_config.to_dict(config))
    varied = what_varies(overrides, configs)
    out, taken = epath.Path(out), _existing(epath.Path(out))
    runs: list[Run] = []
    for config, values in zip(configs, varied, strict=True):
        name = _name_of(values, config, taken)
        if twice := next((run.name for run in runs if run.name == name), None):
            raise ConfigError(f"{file}: sweep: two runs have the config of {twice!r}; drop one")
        runs.append(Run(name, out / name, config, values))
    return runs


def found_in(out: epath.PathLike) -> list[Run]:
    """The runs whose folders are in `out`; every option that is not the same in all varies."""
    out = epath.Path(out)
    existing = _existing(out)
    if not existing:
        raise ConfigError(f"{out}: holds no run (no */config.json)")
    configs = list(existing.values())
    varied = what_varies(configs, configs)
    return [
        Run(name, out / name, config, values)
        for (name, config), values in zip(existing.items(), varied, strict=True)
    ]


def what_varies(
    overrides: Sequence[Mapping[str, Any]], configs: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """For each run {option: value} of the overridden options that are not the same in all runs.

    What an override changed through a FieldReference does not count: the override says it.
    """
    named: dict[str, None] = {}
    for chosen in overrides:
        for path, value in chosen.items():
            named |= dict.fromkeys(leaf for leaf, _ in options.leaves(value, options.parse(path)))
    flat = [dict(options.leaves(config)) for config in configs]
    differing = [
        path for path in named if len({json.dumps(one.get(path)) for one in flat}) > 1
    ]
    return [{path: one[path] for path in differing if path in one} for one in flat]


def name_of(varied: Mapping[str, Any]) -> str:
    """A folder name: "clip=0.5,trainable.0.1=0.003"; options by the shortest end that is theirs."""
    if not varied:
        return "run"
    labels = short_labels(list(varied))
    parts = [f"{labels[path]}={_plain(value)}" for path, value in varied.items()]
    name = ",".join(re.sub(r"[^\w.=+-]+", "_", part) for part in parts)
    if len(name) > LONGEST_NAME:
        digest = hashlib.sha256(json.dumps(dict(varied)).encode()).hexdigest()[:8]
        name = f"{name[: LONGEST_NAME - 9]}~{digest}"
    return name


def short_labels(paths: Sequence[str]) -> dict[str, str]:
    """{path: shortest tail that no other path has}; an index keeps the name before it."""
    labels = {}
    for path in paths:
        parts = [str(part) for part in options.parse(path)]
        names = [i for i, part in enumerate(options.parse(path)) if isinstance(part, str)]
        for start in reversed(names):
            label = ".".join(parts[start:])
            others = (".".join(map(str, options.parse(p))) for p in paths if p != path)
            if not any(f".{other}".endswith(f".{label}") for other in others):
                break
        labels[path] = label
    return labels


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
      state: "new", "started", "stopped" (with status 75), "failed" or "finished".
      step, steps: done, and in all.
      goodput, restarts: as in ledger.json, None before there is one.
    """

    state: str
    step: int
    steps: int
    goodput: float | None = None
    restarts: int | None = None


def progress(run: Run) -> Progress:
    """Reads what `train` and the launcher left in the workdir."""
    steps = run.config["steps"]
    ledger, status = run.workdir / "ledger.json", exit_status(run)
    if ledger.exists():
        found = json.loads(ledger.read_text())
        figures = (found["step"], steps, found["goodput"], found["restarts"])
        if found["finished"]:
            return Progress("finished", *figures)
        failed = status not in (None, 0, 75)
        return Progress("failed" if failed else "stopped", *figures)
    if status not in (None, 0, 75):
        return Progress("failed", 0, steps)
    return Progress("started" if (run.workdir / "metrics.jsonl").exists() else "new", 0, steps)


def exit_status(run: Run) -> int | None:
    """The status that the last process of the run ended with, where its launcher wrote it."""
    path = run.workdir / EXIT_FILE
    return int(path.read_text()) if path.exists() else None


def write_config(run: Run) -> None:
    """Puts config.json into the workdir; `train --config=.../config.json` runs exactly that."""
    files.write(run.config_path, json.dumps(run.config, indent=2) + "\n")


def _load(file: str) -> Any:
    spec = importlib.util.spec_from_file_location("swept_config", file)
    if spec is None or not epath.Path(file).exists():
        raise ConfigError(f"{file}: no such config file; expected FILE.py[:ARG]")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _collect(module: Any, arg: str, file: str) -> list[dict[str, Any]]:
    """What the file's `sweep` adds."""
    if not hasattr(module, "sweep"):
        raise ConfigError(f"{file}: has no sweep(add); see docs/sweeps.md")
    overrides: list[dict[str, Any]] = []

    def add(**values: Any) -> None:
        overrides.append(values)

    sweep: Callable[..., None] = module.sweep
    sweep(add, arg) if len(inspect.signature(sweep).parameters) > 1 else sweep(add)
    if not overrides:
        raise ConfigError(f"{file}: sweep(add) added no run")
    return overrides


def _existing(out: epath.Path) -> dict[str, Any]:
    """{name: config} of the workdirs in `out`; options that are younger have their defaults."""
    if not out.exists():
        return {}
    found = sorted(path for path in out.iterdir() if (path / "config.json").exists())
    return {
        path.name: training_config.to_dict(
            training_config.from_dict(json.loads((path / "config.json").read_text()))
        )
        for path in found
    }


def _name_of(varied: Mapping[str, Any], config: Any, taken: Mapping[str, Any]) -> str:
    """The name of the folder that holds this very run, or a new one."""
    for name, other in taken.items():
        if not changed_since(other, config):
            return name
    name = name_of(varied)
    if name not in taken:
        return name
    digest = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:8]
    return f"{name}~{digest}"  # a folder of that name holds a run with other options


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).lower() if isinstance(value, bool) else str(value) or "none"
