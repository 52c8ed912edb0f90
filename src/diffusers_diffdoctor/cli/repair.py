# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor repair PATH... --output DIR`: draw anew what a detector marks, by any inpainting pipeline."""

import argparse

from .pipelines import add_pipeline_kwargs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="image files, or folders that are searched for images"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for repaired images; run again to continue"
    )
    parser.add_argument(
        "--detector", required=True, metavar="NAME", help="Hub id or folder of the detector that says where"
    )
    parser.add_argument(
        "--judge",
        metavar="NAME",
        help="Hub id or folder of a second detector that says which try is best (default: the detector, which judges its own work)",
    )
    parser.add_argument(
        "--pipeline",
        required=True,
        metavar="NAME",
        help="Hub id or folder of a pipeline that diffusers can inpaint with",
    )
    parser.add_argument("--prompt", default="", help="what the images show (default: nothing said)")
    parser.add_argument("--tries", type=int, default=4, help="of which the best is kept (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the tries (default: %(default)s)")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="confidence in (0, 1] from which a pixel is wrong (default: %(default)s)",
    )
    parser.add_argument(
        "--growth",
        type=float,
        default=0.02,
        help="by how much regions are grown, in shares of the shorter side (default: %(default)s)",
    )
    parser.add_argument(
        "--feather",
        type=float,
        default=0.01,
        help="width of their soft edge, in shares of the shorter side (default: %(default)s)",
    )
    parser.add_argument(
        "--strength", type=float, default=0.75, help="share in (0, 1] of noise to draw from (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=30, help="of the denoiser (default: %(default)s)")
    parser.add_argument(
        "--size",
        type=int,
        default=512,
        help="pixels at which a region is drawn, a multiple of 64 (default: %(default)s)",
    )
    parser.add_argument(
        "--context",
        type=float,
        default=0.5,
        help="how much of the image the pipeline sees around a region, in shares of its longer side; inf for the whole image "
        "(default: %(default)s)",
    )
    add_pipeline_kwargs(parser)
    parser.add_argument("--device", default=None, help="such as cpu, cuda, cuda:1, mps; by default the best there is")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the pipeline (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    from ..files import FolderInUse, find_images
    from ..inpainting import check_pipeline_kwargs, load_inpainting_pipeline
    from ..loading import weights_sha256
    from ..repair import check_repair, repair
    from ..repair.files import repair_images
    from .diagnose import best_device, load_detector

    options = ("prompt", "tries", "seed", "threshold", "growth", "feather", "strength", "steps", "size", "context")
    settings = {name: getattr(args, name) for name in options}
    check_repair(**{name: value for name, value in settings.items() if name not in ("prompt", "seed")})
    settings["pipeline_kwargs"] = args.pipeline_kwargs
    find_images(args.paths)  # a wrong path is said before anything is loaded
    device = args.device or best_device()
    detector = load_detector(args.detector, device)
    judge = load_detector(args.judge, device) if args.judge else detector
    pipeline = load_inpainting_pipeline(args.pipeline, device, args.precision)
    check_pipeline_kwargs(pipeline, args.pipeline_kwargs)
    made_by = settings | {
        "detector": weights_sha256(detector),
        "judge": weights_sha256(judge),
        "pipeline": args.pipeline,
        "precision": args.precision,
    }
    try:
        counts = repair_images(
            args.paths, args.output, lambda image: repair(image, pipeline, detector, judge, **settings), made_by
        )
    except FolderInUse as error:
        raise ValueError(f"`--output`: {error}") from error
    except KeyboardInterrupt:
        print(f"\nStopped. What is done is kept in {args.output}: run the same command again to continue.")
        return 130
    print(
        f"{counts['found']} found = {counts['better']} repaired + {counts['no_better']} that no try made better + "
        f"{counts['sound']} sound + {counts['quarantined']} quarantined + {counts['skipped']} skipped; see {args.output}"
    )
    return 0 if counts["found"] > counts["quarantined"] + counts["skipped"] else 1
