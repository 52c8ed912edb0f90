# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor miniature ACTION`: where the bundled parts lie, their scenes as files, all of it built anew."""

import argparse
from pathlib import Path

from ..files import write_atomically
from ..miniature import PARTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")
    path = actions.add_parser("path", help="print the folder of a bundled part")
    path.add_argument("part", choices=PARTS)
    render = actions.add_parser("render", help="write scenes with their artifact maps as an image folder")
    render.add_argument("--output", required=True, help="new folder for the files and metadata.jsonl")
    render.add_argument("--count", type=int, default=100, help="number of scenes (default: %(default)s)")
    render.add_argument(
        "--wrong-share",
        type=float,
        default=0.5,
        help="share of wrong scenes among those that can be wrong, 0 to 1 (default: %(default)s)",
    )
    render.add_argument("--seed", type=int, default=0, help="decides the scenes (default: %(default)s)")
    build = actions.add_parser("build", help="train parts from scratch on a CPU, which takes hours for all")
    build.add_argument("--output", required=True, help="folder for the parts; a VAE that lies there is used again")
    build.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to build (default: all)")
    build.add_argument("--quick", action="store_true", help="a few steps of everything: useless parts, soon")
    check = actions.add_parser("check", help="measure the parts: reproduction, recognition, error rates; JSON")
    check.add_argument("--folder", help="where the parts lie (default: the bundled ones)")


def run(args: argparse.Namespace) -> int:
    if args.action == "path":
        from ..miniature import load

        print(load(args.part))
    elif args.action == "render":
        print(f"{write_scenes(Path(args.output), args.count, args.wrong_share, args.seed)} scenes in {args.output}")
    elif args.action == "check":
        import json
        import sys
        from contextlib import redirect_stdout

        from ..miniature import WEIGHTS
        from ..miniature.check import check

        with redirect_stdout(sys.stderr):  # loading a judge prints; what goes to a file must be JSON
            figures = check(args.folder or WEIGHTS)
        print(json.dumps(figures, indent=2))
    else:
        from ..miniature.build import build

        print(f"Built {', '.join(args.parts)} in {build(tuple(args.parts), args.output, quick=args.quick)}")
    return 0


def write_scenes(output: Path, count: int, wrong_share: float, seed: int) -> int:
    """Scenes as `images/*.png` and `maps/*.png` with a metadata.jsonl that `load_dataset("imagefolder")` reads."""
    import json

    import numpy as np
    from PIL import Image
    from tqdm.auto import tqdm

    from ..miniature.renderer import render, sample_scene

    if count < 1:
        raise ValueError(f"--count is {count}, but must be at least 1.")
    if not 0 <= wrong_share <= 1:
        raise ValueError(f"--wrong-share is {wrong_share}, but must lie in [0, 1].")
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"--output {output} is not empty; choose a new folder.")
    for folder in ("images", "maps"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in tqdm(range(count), desc="render", unit="scene"):
        scene = sample_scene(rng, wrong_share)
        image, artifact_map = render(scene)
        names = {"file_name": f"images/{i:06d}.png", "artifact_map_file_name": f"maps/{i:06d}.png"}
        Image.fromarray(image).save(output / names["file_name"])
        Image.fromarray(artifact_map).save(output / names["artifact_map_file_name"])
        described = {"prompt": scene.caption, "category": scene.category, "artifacts": list(scene.artifacts)}
        rows.append(names | described | {"source": "rendered"})
    # last, so that a folder with metadata is whole
    write_atomically(output / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)
