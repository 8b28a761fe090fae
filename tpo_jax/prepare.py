"""Media files and annotations to prepared folders, and a look at both.

python -m tpo_jax.prepare run --data world/train --out prepared/train --size 64
python -m tpo_jax.prepare run --config configs/prepare.py:world/train --out prepared/train
python -m tpo_jax.prepare check --format qvhighlights --annotations highlight_train.jsonl
python -m tpo_jax.prepare features --model runs/demo/stage1/model --data world/train --out features
python -m tpo_jax.prepare tokenizer --data prepared/train --out prepared/tokenizer.json
python -m tpo_jax.prepare inspect --config configs/demo.py:stage=1 --step 7 --out row.png
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from tpo_jax.data import files, formats
from tpo_jax.data.clip_features import FeatureStore
from tpo_jax.data.ingest import statistics
from tpo_jax.data.ingest.plan import (
    MediaItem,
    PrepareError,
    Settings,
    Source,
    check_names,
    make_plan,
    read_source,
)
from tpo_jax.data.ingest.run import prepare
from tpo_jax.data.ingest.sources import check_config, from_config, from_manifest
from tpo_jax.data.ingest.upload import upload
from tpo_jax.data.media import MediaFolder
from tpo_jax.data.records import MEDIA, PreparedDataset
from tpo_jax.data.text import TextCodec, texts_of, train_tokenizer
from tpo_jax.data.video import media_kind
from tpo_jax.errors import MissingFile, Parser, UserError, report
from tpo_jax.models.heads.listed import load_listed

if TYPE_CHECKING:  # needs a second to import
    from tpo_jax.data.pipeline import Pipeline

RUN_EXAMPLES = """examples:
  # a data set that names its own annotations in dataset.json (as moving_shapes writes it)
  python -m tpo_jax.prepare run --data world/train --out prepared/train --size 64 --processes 2
  # any folder of videos and one annotation file
  python -m tpo_jax.prepare run --media videos --format native --annotations a.jsonl --out prepared
  # into a bucket, by way of a local folder
  python -m tpo_jax.prepare run --data world/train --out gs://BUCKET/train --local prepared/train
  # several sources by config; any value can be changed on the command line
  python -m tpo_jax.prepare run --config configs/prepare.py:world --config.fps=4 --out prepared

A run that was stopped, even by kill -9, is continued by the same command.
"""
FEATURES_EXAMPLES = """examples:
  # of the videos that a data set is about; then keep them beside the frames, and train on them
  python -m tpo_jax.prepare features --model runs/demo/stage1/model --data world/train \\
      --out features/train
  python -m tpo_jax.prepare run --data world/train --features features/train --out prepared/train
  # of every video in a folder, for predict
  python -m tpo_jax.prepare features --model MODEL --media videos --out features

A run that was stopped is continued by the same command. The exit status is 1 when a video could not
be read. docs/heads.md says how features of other encoders come in.
"""
TOKENIZER_EXAMPLES = """examples:
  python -m tpo_jax.prepare tokenizer --data prepared/train --out prepared/tokenizer.json
  python -m tpo_jax.prepare tokenizer --data gs://BUCKET/train --out gs://BUCKET/tokenizer.json \\
      --vocabulary 4000
"""
CHECK_EXAMPLES = """examples:
  python -m tpo_jax.prepare check --format videochat2 --annotations conversations.json
  python -m tpo_jax.prepare check --format native --annotations my.jsonl --media videos
  python -m tpo_jax.prepare check --format mevis --annotations mevis/train --frame_rate 6 \\
      --media mevis/train/JPEGImages
  # a split that is published without labels
  python -m tpo_jax.prepare check --format mevis --annotations mevis/valid --frame_rate 6 \\
      --media mevis/valid/JPEGImages --unlabelled
  # one split of a file that holds them all
  python -m tpo_jax.prepare check --format refcoco --annotations refcoco --split train

The exit status is 1 when a record is invalid.
"""
INSPECT_EXAMPLES = """examples:
  # rows of a prepared folder, before there is a model: a tokenizer is trained on its texts
  python -m tpo_jax.prepare inspect --data prepared/train --out row.html
  # a row of the batch that `train` is given at step 7; the last rows are those of a bucket beside
  python -m tpo_jax.prepare inspect --config configs/demo.py:stage=1 --step 7 --row 2 --out row.png
  # as it was changed on the command line, and of a run that is there
  python -m tpo_jax.prepare inspect --config configs/demo.py:stage=1 --config.data.evidence=blind
  python -m tpo_jax.prepare inspect --config runs/demo/dpo/config.json
"""
KNOWN = "one of the formats below"
SETTINGS = ("fps", "size", "encoding")
_OF_SOURCE = ("format", "annotations", "frame_rate", "unlabelled", "split")
# What says where the data is, and the options that it leaves no room for.
NOT_READ = {
    "config": (*SETTINGS, "processes", *_OF_SOURCE, "ignore_keys"),
    "data": _OF_SOURCE,
    "media": (),
}
FORMATS = "\nformats (docs/formats.md):\n" + "".join(
    f"  {form.name:22s}{form.description}\n" for form in formats.FORMATS.values()
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    load_listed()
    parser = _parser()
    options, config_arguments = parser.parse_known_args(arguments)
    stray = [a for a in config_arguments if not a.startswith("--config.")]
    if stray or (config_arguments and not getattr(options, "config", None)):
        parser.error(f"unrecognized arguments: {' '.join(stray or config_arguments)}")
    try:
        if options.command == "check":
            return _check(options)
        if options.command == "tokenizer":
            return _tokenizer(options)
        if options.command == "features":
            return _features(options, config_arguments)
        if options.command == "inspect":
            return _inspect(options, config_arguments)
        return _run(options, config_arguments)
    except UserError as error:
        return report(error)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m tpo_jax.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{run,check,features,tokenizer,inspect}"
    )
    _add_run(commands)
    _add_check(commands)
    _add_features(commands)
    _add_tokenizer(commands)
    _add_inspect(commands)
    return parser


def _add_command(commands: Any, name: str, what: str, epilog: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_run(commands: Any) -> None:
    run = _add_command(
        commands, "run", "decode media and write the two tables", RUN_EXAMPLES + FORMATS
    )
    run.add_argument(
        "--out", type=epath.Path, required=True, help="the folder to write, local or gs://"
    )
    run.add_argument(
        "--local", type=files.local_path, help="with --out=gs://: where it is made first, and stays"
    )
    _add_sources(run)
    run.add_argument(
        "--features", type=epath.Path, help="a folder of clip features to keep beside the frames"
    )
    # Without defaults: what is given beside a config, which has its own, is refused.
    run.add_argument("--fps", type=float, help="frames a second to keep (2)")
    run.add_argument("--size", type=int, help="square frames of so many pixels (native size)")
    run.add_argument("--encoding", help="raw or jpeg (raw)")
    run.add_argument("--processes", type=int, help="parallel processes (1)")


def _add_check(commands: Any) -> None:
    what = "list the invalid records of an annotation file"
    check = _add_command(commands, "check", what, CHECK_EXAMPLES + FORMATS)
    check.add_argument(
        "--format", required=True, choices=formats.FORMATS, metavar="NAME", help=KNOWN
    )
    check.add_argument("--annotations", type=files.local_path, required=True)
    check.add_argument("--media", type=files.local_path, help="also look the media up")
    _add_frame_rate(check)
    _add_unlabelled(check)
    _add_split(check)
    _add_ignore_keys(check)


def _add_features(commands: Any) -> None:
    what = "clip features of videos by the video encoder of a model"
    features = _add_command(commands, "features", what, FEATURES_EXAMPLES + FORMATS)
    features.add_argument("--model", required=True, help="a model folder")
    features.add_argument("--out", type=epath.Path, required=True, help="the folder to write")
    _add_sources(features)
    features.add_argument("--clip_seconds", type=float, default=2.0, help="of a clip (2)")
    features.add_argument(
        "--frames", type=int, default=0, help="of a clip (4, or those of the encoder)"
    )


def _add_tokenizer(commands: Any) -> None:
    what = "train a tokenizer on the questions and answers of a prepared folder"
    tokenizer = _add_command(commands, "tokenizer", what, TOKENIZER_EXAMPLES)
    tokenizer.add_argument("--data", type=epath.Path, required=True, help="a prepared folder")
    tokenizer.add_argument("--out", type=epath.Path, required=True, help="tokenizer.json")
    tokenizer.add_argument("--vocabulary", type=int, default=1000, help="most tokens (1000)")


def _add_inspect(commands: Any) -> None:
    inspect = _add_command(commands, "inspect", "draw one training row", INSPECT_EXAMPLES)
    where = inspect.add_mutually_exclusive_group(required=True)
    where.add_argument("--data", metavar="DIR", help="a prepared folder")
    where.add_argument(
        "--config", metavar="FILE", help="of training; --config.key=value changes it"
    )
    inspect.add_argument(
        "--model",
        metavar="DIR",
        help="with --data: folder with tokenizer.json and template.json (default: trained on the "
        "folder's texts)",
    )
    inspect.add_argument("--step", type=int, default=0, help="which batch (0)")
    inspect.add_argument("--row", type=int, default=0, help="which row of the batch (0)")
    inspect.add_argument(
        "--out",
        type=epath.Path,
        default=epath.Path("row.html"),
        help="file to write, .html or .png (row.html)",
    )


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=files.local_path, help="a folder with a dataset.json")
    parser.add_argument("--config", help="a config file, configs/prepare.py:ARG")
    parser.add_argument("--media", type=files.local_path, help="the folder of the media files")
    parser.add_argument("--format", choices=formats.FORMATS, metavar="NAME", help=KNOWN)
    parser.add_argument("--annotations", type=files.local_path, help="annotation file or folder")
    _add_frame_rate(parser)
    _add_unlabelled(parser)
    _add_split(parser)
    _add_ignore_keys(parser)


def _add_ignore_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore_keys",
        type=lambda text: frozenset(text.split(",")),
        metavar="A,B",
        help="keys of records that are known to mean nothing here",
    )


def _add_frame_rate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--frame_rate",
        type=_frame_rate,
        metavar="N",
        help="pictures a second of folders of pictures whose annotations do not say it",
    )


def _add_unlabelled(parser: argparse.ArgumentParser) -> None:
    reads = (form.name for form in formats.FORMATS.values() if form.unlabelled)
    parser.add_argument(
        "--unlabelled",
        action="store_true",
        default=None,  # what is given beside --data or --config is refused
        help="the split is published without labels: it can be answered for a submission, not "
        f"scored or trained on ({', '.join(reads)})",
    )


def _add_split(parser: argparse.ArgumentParser) -> None:
    several = (form.name for form in formats.FORMATS.values() if form.split)
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="which split is read of annotations that hold several; these are not read without "
        f"({', '.join(several)})",
    )


def _frame_rate(text: str) -> float:
    rate = float(text)
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a positive number")
    return rate


def _tokenizer(options: argparse.Namespace) -> int:
    tokenizer = train_tokenizer(texts_of(PreparedDataset(options.data)), options.vocabulary)
    files.write(options.out, tokenizer.to_str(pretty=True))
    print(f"{options.out}: {tokenizer.get_vocab_size()} tokens")
    return 0


def _run(options: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    folder = _local_folder(options)
    sources, settings, processes = _sources(options, config_arguments)
    if not options.config:
        settings = Settings(**_given(options, SETTINGS))
        processes = 1 if options.processes is None else options.processes
    features = FeatureStore(options.features) if options.features else None
    found = prepare(sources, folder, settings, processes, features=features)
    if options.local:
        upload(folder, options.out)
    print(f"prepared {options.out}")
    print(statistics.table(found))
    if found["quarantined"]:
        print(f"{found['quarantined']} left out, see {options.out / 'quarantine.jsonl'}")
    return 0


def _local_folder(options: argparse.Namespace) -> pathlib.Path:
    """Where the tables are written: --out, or --local where that is a bucket."""
    if files.is_remote(options.out):
        if not options.local:
            raise PrepareError(
                f"--out={options.out}: tables are written on a disk first; name a folder for them "
                "with --local=DIR, where they stay"
            )
        return options.local
    if options.local:
        raise PrepareError(f"--local={options.local}: means nothing without --out=gs://...")
    return pathlib.Path(options.out)


def _sources(
    options: argparse.Namespace, config_arguments: Sequence[str]
) -> tuple[list[Source], Settings | None, int | None]:
    """The sources that the options name, and settings and processes of a config."""
    ways = [name for name in ("data", "config", "media") if getattr(options, name) is not None]
    if len(ways) != 1:
        raise PrepareError("say where the data is: one of --data, --config, or --media")
    for name, value in _given(options, NOT_READ[ways[0]]).items():
        value = ",".join(sorted(value)) if isinstance(value, frozenset) else value
        fix = "say it in dataset.json"
        if ways[0] == "config":
            of_config = name in (*SETTINGS, "processes")
            fix = f"give --config.{name}={value}" if of_config else "say it in config.sources"
        raise PrepareError(f"--{name}={value}: is not read beside --{ways[0]}; {fix}")
    if options.config:
        config = _load_config(options.config, config_arguments)
        check_config(config)
        return from_config(config)
    ignore_keys = options.ignore_keys or frozenset()
    if options.data:
        return from_manifest(options.data, ignore_keys), None, None
    if not options.format or not options.annotations:
        raise PrepareError("--media needs --format and --annotations")
    source = Source(
        options.media,
        options.format,
        options.annotations,
        options.annotations.stem,
        ignore_keys,
        options.frame_rate,
        bool(options.unlabelled),
        options.split,
    )
    return [source], None, None


def _given(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of the options that are on the command line."""
    found = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _features(options: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    from tpo_jax.generation import clip_features  # runs a model; the others do not need it

    items = _videos(options, config_arguments)
    extractor = clip_features.Extractor.from_folder(
        options.model, clip_seconds=options.clip_seconds, frames=options.frames
    )
    store = FeatureStore.create(options.out, extractor.about)
    check_names(store, (item.video_id for item in items))
    failed = clip_features.extract(extractor, items, store)
    for error in failed:
        print(f"error: {error}", file=sys.stderr)
    print(
        f"{options.out}: {len(items) - len(failed)} videos, {extractor.about.width} numbers for "
        f"every {extractor.about.clip_seconds:g} s, of {extractor.about.encoder}"
    )
    return 1 if failed else 0


def _videos(options: argparse.Namespace, config_arguments: Sequence[str]) -> list[MediaItem]:
    """The videos that annotations are about, or without any all in --media."""
    if options.media and not options.format and not options.annotations:
        folder = MediaFolder(options.media)
        return [MediaItem(folder.path(name), name, ()) for name in folder.videos()]
    sources, _, _ = _sources(options, config_arguments)
    plan = make_plan(sources, Settings())
    if plan.problems:
        print(f"{len(plan.problems)} records are not valid, see `prepare check`", file=sys.stderr)
    items = (item for piece in plan.pieces for item in piece.items)
    return [item for item in items if media_kind(item.path) == "video"]


def _inspect(options: argparse.Namespace, config_arguments: Sequence[str]) -> int:
    from tpo_jax.data import inspect  # draws with matplotlib; the others do not need it

    if options.config:
        if options.model:
            raise PrepareError("--model: belongs to --data; a config names its own; leave it out")
        pipeline, codec = _training_pipeline(options.config, config_arguments)
    else:
        pipeline, codec = inspect.pipeline_of_folder(options.data, options.model)
    rows = pipeline.rows(options.step)
    if not 0 <= options.row < len(rows):
        raise PrepareError(
            f"--row {options.row}: the batch of step {options.step} has {len(rows)} rows"
        )
    bucket, plan, row = rows[options.row]
    files.write(options.out, inspect.render(row, codec, plan, options.out.suffix))
    for line in inspect.wrap(inspect.describe_row(row, codec, plan)):
        print("".join(span.text for span in line))
    print(f"step {options.step}, bucket {bucket}, row {options.row}: {options.out}")
    return 0


def _training_pipeline(path: str, overrides: Sequence[str]) -> tuple[Pipeline, TextCodec]:
    """What `train` would read at the start of a run with this config, on one host."""
    from tpo_jax.data.pipeline import Pipeline  # and what follows: the others do not need it
    from tpo_jax.training import config as training_config
    from tpo_jax.training.start import make_model_config, pipeline_options

    config = _load_config(path, overrides)
    training_config.validate(config)
    model_config, codec = make_model_config(config)
    sources = training_config.to_dict(config)["data"]["train"]
    return Pipeline(sources, **pipeline_options(config, model_config, codec)), codec


def _load_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    from tpo_jax.training.config_flag import define_config, mistake  # few commands have one

    values = flags.FlagValues()
    arguments = ["prepare", f"--config={path}", *overrides]
    holder = define_config("config", flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
    except flags.Error as error:  # a mistyped --config.KEY=VALUE
        raise mistake(error) from error
    return holder.value


def _check(options: argparse.Namespace) -> int:
    if not options.annotations.exists():
        raise MissingFile(f"--annotations: {options.annotations} does not exist; correct the path")
    media = MediaFolder(options.media) if options.media else None
    source = Source(
        options.media,
        options.format,
        options.annotations,
        "check",
        options.ignore_keys or frozenset(),
        options.frame_rate,
        bool(options.unlabelled),
        options.split,
    )
    drafts, problems = read_source(source, media)
    for problem in problems:
        print(problem)
    noun = "problem" if len(problems) == 1 else "problems"
    print(f"{options.annotations}: {len(drafts)} valid examples, {len(problems)} {noun}")
    examples = [draft.example for draft in drafts]
    media_of = {kind: {e.video_id for e in examples if e.media == kind} for kind in MEDIA}
    table = {
        **{f"{kind}s": len(names) for kind, names in media_of.items()},
        **statistics.count_examples(examples),
        "problems_by_reason": statistics.by_reason(problem.to_json() for problem in problems),
    }
    print(statistics.table(table))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
