# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor ui`: pages in the browser, to paint masks, to look at diagnoses, to compare two folders."""

import argparse
import importlib.util
from contextlib import ExitStack

from .data import add_dataset


LOOPBACK = "127.0.0.1"
INSTALL = 'pip install "diffusers-diffdoctor[ui]"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser, "--annotate", help="images to paint masks on, such as the split `hard` of `data mine`")
    parser.add_argument("--queue", metavar="DIR", help="folder that keeps the masks; the same one goes on")
    parser.add_argument(
        "--copies", type=int, default=1, help="annotators that are to finish each image (default: %(default)s)"
    )
    parser.add_argument(
        "--loan-minutes",
        type=float,
        default=5,
        help="after which an image whose page was closed is lent to another (default: %(default)s)",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="take these images instead of those of another dataset that the queue was begun with; masks stay with their images",
    )
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="kinds of artifact to choose from")
    parser.add_argument(
        "--detector",
        metavar="NAME",
        help="Hub id or folder of a detector, which suggests masks, diagnoses and compares; `miniature` is the bundled one",
    )
    parser.add_argument("--before", metavar="DIR", help="folder of images to compare")
    parser.add_argument(
        "--after", metavar="DIR", help="folder of images of the same names, of another checkpoint, say"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="highest confidence in (0, 1] from which a compared image has an artifact (default: %(default)s)",
    )
    parser.add_argument("--device", help="such as cpu, cuda, cuda:1, mps; by default the best there is")
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        help="address to listen to; 0.0.0.0 lets every machine of the network in, without a password (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=7860, help="to listen to (default: %(default)s)")
    parser.add_argument(
        "--max-upload", type=int, default=20, metavar="MB", help="largest file to be dropped (default: %(default)s)"
    )
    parser.add_argument(
        "--share-space",
        metavar="DIR",
        help="serve nothing: write a folder that is a Space of the Hub, which diagnoses with `--detector`, an id of the Hub",
    )


def run(args: argparse.Namespace) -> int:
    _check(args)
    if args.share_space:
        from ..ui.space import write_space

        print(write_space(args.share_space, args.detector, max_upload_megabytes=args.max_upload))
        return 0
    missing = [name for name in ("gradio", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"The pages need {', '.join(missing)}, which is not installed: {INSTALL}.")

    from ..ui.application import create_application, serve

    with ExitStack() as stack:
        detector = _detector(args)
        queue = _queue(args, detector)
        if queue is not None:
            stack.callback(queue.close)
        comparison = None
        if args.before:
            from ..ui.comparison import Comparison

            comparison = Comparison(args.before, args.after, detector, threshold=args.threshold)
        app = create_application(queue, detector, comparison, host=args.host, max_upload_megabytes=args.max_upload)
        print(f"http://{args.host}:{args.port}  (Ctrl+C ends it; nothing is lost)", flush=True)
        serve(app, args.host, args.port)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.share_space:
        if not args.detector:
            raise ValueError("`--share-space` needs `--detector`, the id on the Hub of the detector that it shows.")
        return
    if bool(args.annotate) != bool(args.queue):
        raise ValueError(
            "`--annotate` and `--queue` belong together: the images, and the folder that keeps their masks."
        )
    if bool(args.before) != bool(args.after):
        raise ValueError("`--before` and `--after` belong together: two folders of images of the same names.")
    if args.before and not args.detector:
        raise ValueError("`--before` and `--after` need `--detector`, which says what became worse.")
    if not args.annotate and not args.detector:
        raise ValueError("There is nothing to show: give `--annotate` with `--queue`, or `--detector`, or both.")
    if not 1 <= args.port <= 65535:
        raise ValueError(f"`--port` must lie in [1, 65535], found {args.port}.")
    if args.max_upload < 1:
        raise ValueError(f"`--max-upload` must be at least 1, found {args.max_upload}.")
    if not args.loan_minutes > 0:
        raise ValueError(f"`--loan-minutes` must be positive, found {args.loan_minutes}.")


def _detector(args: argparse.Namespace):
    if not args.detector:
        return None
    from ..ui.looking import Detector
    from .diagnose import load_detector

    return Detector(load_detector(args.detector, args.device), args.detector)


def _queue(args: argparse.Namespace, detector):
    if not args.annotate:
        return None
    from ..data import find_or_load_shards
    from ..data.annotate import KINDS
    from ..data.shards import split_name
    from ..files import FolderInUse
    from ..ui import Queue

    shards = find_or_load_shards(*split_name(args.annotate), excluded=[args.queue])
    try:
        return Queue(
            shards,
            args.queue,
            copies=args.copies,
            loan_seconds=60 * args.loan_minutes,
            kinds=args.kinds or KINDS,
            suggest=detector.map_of if detector else None,
            restart=args.restart,
        )
    except FolderInUse as error:
        raise ValueError(f"`--queue`: {error}") from error
