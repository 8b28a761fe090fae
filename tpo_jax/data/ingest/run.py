"""The whole preparation: lock, plan, parallel work with a progress bar, assembly."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import json
import multiprocessing
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import tqdm

from tpo_jax.data.clip_features import FeatureStore
from tpo_jax.data.ingest.assemble import NothingLeft, assemble
from tpo_jax.data.ingest.plan import Piece, Plan, PrepareError, Settings, Source, make_plan
from tpo_jax.data.ingest.work import do_piece
from tpo_jax.data.workers import end_with_parent
from tpo_jax.models.heads.listed import load_listed


def prepare(
    sources: Sequence[Source],
    out: pathlib.Path,
    settings: Settings,
    processes: int = 1,
    progress: bool = True,
    features: FeatureStore | None = None,
) -> dict[str, Any]:
    """Makes the prepared folder `out` and returns its statistics.

    Unfinished work is kept in `<out>.partial`; the same call continues it, however it ended.
    Nothing is kept where all of it is done and nothing of it is usable. A folder that is there
    already is returned as it is when it was made from the same inputs.

    Raises:
      PrepareError: `out` holds something else, another process works on it, or nothing is usable.
    """
    plan = make_plan(sources, settings, features)
    if out.exists() and any(out.iterdir()):
        return _finished(plan, out)
    partial = out.with_name(out.name + ".partial")
    parts = partial / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    with _locked(partial, out):
        _remove_leftovers(parts, plan)
        _work(plan, parts, processes, progress)
        try:
            statistics = assemble(plan, parts, out)
        except NothingLeft:  # the pieces hold no row to go on from
            shutil.rmtree(partial)
            raise
    shutil.rmtree(partial)
    return statistics


def _finished(plan: Plan, out: pathlib.Path) -> dict[str, Any]:
    marker = out / "prepared.json"
    if not marker.exists():
        raise PrepareError(f"{out} exists and is not a prepared folder; choose another --out")
    if json.loads(marker.read_text("utf-8"))["fingerprint"] != plan.fingerprint:
        raise PrepareError(
            f"{out} was prepared from other media, annotations or settings; remove it or choose "
            "another --out"
        )
    return json.loads((out / "statistics.json").read_text("utf-8"))


@contextlib.contextmanager
def _locked(partial: pathlib.Path, out: pathlib.Path) -> Iterator[None]:
    """Only one process works on an output; the lock ends with the process, however it ends."""
    with (partial / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PrepareError(
                f"another process is preparing {out}; wait for it, or choose another --out"
            ) from error
        yield


def _remove_leftovers(parts: pathlib.Path, plan: Plan) -> None:
    """Half-written pieces of a killed run, and pieces whose inputs have changed."""
    wanted = {piece.key for piece in plan.pieces}
    for folder in parts.iterdir():
        if folder.name not in wanted:
            shutil.rmtree(folder)


def _work(plan: Plan, parts: pathlib.Path, processes: int, progress: bool) -> None:
    todo = [piece for piece in plan.pieces if not (parts / piece.key).is_dir()]
    done = plan.num_media - sum(len(piece.items) for piece in todo)
    bar = tqdm.tqdm(
        total=plan.num_media, initial=done, unit="media", desc="prepare", disable=not progress
    )
    bad = len(plan.problems)
    with bar:
        for piece, problems in _results(todo, plan, parts, min(processes, len(todo))):
            bad += problems
            bar.set_postfix(quarantined=bad, refresh=False)
            bar.update(len(piece.items))


def _results(
    todo: Sequence[Piece], plan: Plan, parts: pathlib.Path, processes: int
) -> Iterator[tuple[Piece, int]]:
    """(piece, number of its problems) as they are finished."""
    if processes <= 1:
        for piece in todo:
            yield piece, do_piece(piece, plan.settings, parts, plan.features)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        processes, context, initializer=_start_worker
    ) as pool:
        futures = {
            pool.submit(do_piece, piece, plan.settings, parts, plan.features): piece
            for piece in todo
        }
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise PrepareError(
                "a worker process died (out of memory, or killed); run the same command again to "
                "continue, with fewer --processes if memory was short"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker() -> None:
    end_with_parent()
    load_listed()
