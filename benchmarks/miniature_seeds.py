# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The treatment of the miniature on several seeds: mean and range, because one seed's digits are chance.

Each seed is one run of what `make treat` runs, and one file of results (a cell). A cell that exists is not run again, so a
stopped benchmark goes on where it was, and several may share the seeds of one table.

    python benchmarks/miniature_seeds.py                                   # seeds 42 to 46 on the final split: the README's table
    python benchmarks/miniature_seeds.py --split development --drift_weight 0      # further flags go to the treatment
    python benchmarks/miniature_seeds.py --seeds 42 --max_steps 2 --report_images 8        # does it run?

Cells go to benchmarks/results/miniature_seeds, the runs themselves to runs/miniature_seeds.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from diffusers_diffdoctor.files import write_atomically


ROOT = Path(__file__).parents[1]
HEADER = "| run | judge | detector | plain, judge | fidelity | diversity, pixels / CLIP | change inside / outside |"


def cell_name(seed: int, split: str, threads: int, flags: list[str]) -> str:
    """A file name that says what was run."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(flags)).strip("-")
    return f"seed{seed}-{split}-threads{threads}" + (f"-{slug}" if slug else "")


def run_cell(seed: int, split: str, threads: int, flags: list[str], results: Path, runs: Path) -> dict:
    """The cell from its file, or from a run that then writes it."""
    name = cell_name(seed, split, threads, flags)
    path, output_dir = results / f"{name}.json", runs / name
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    shutil.rmtree(output_dir, ignore_errors=True)  # what a stopped benchmark left
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", str(ROOT / "examples/accelerate/single_process.yaml")]
    command += [str(ROOT / "examples/treat_flux.py"), "--pipeline", "miniature", "--output_dir", str(output_dir)]
    command += ["--seed", str(seed), "--split", split, *flags]
    start = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    cell = {
        "seed": seed,
        "split": split,
        "threads": threads,
        "flags": flags,
        "commit": commit(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "seconds": round(time.perf_counter() - start, 1),
        "figures": figures_of(output_dir),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(cell, indent=2) + "\n")
    return cell


def commit() -> str | None:
    """The checkout's commit, "+" after it where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    changed = subprocess.run([*git, "status", "--porcelain", "src", "examples"], capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def figures_of(output_dir: Path) -> dict:
    """What a row of the table needs, from the reports of a run. Shares in [0, 1]; a figure that was not measured is None."""
    report, plain = (
        json.loads((output_dir / part / "report.json").read_text(encoding="utf-8")) for part in ("", "plain")
    )
    figures = {
        name: {side: values[side] for side in ("before", "after")}
        for name, values in (
            ("judge", report["artifact_frequency"]["judge"]),
            ("detector", report["artifact_frequency"]["detector"]),
            ("plain", plain["artifact_frequency"]["judge"]),
            ("fidelity", report["fidelity"]),
        )
    }
    for name in ("pixels", "CLIP"):
        sides = report["diversity_by"].get(name)
        figures[f"diversity_{name}"] = sides["after"] / sides["before"] - 1 if sides else None
    categories = {name: rows["judge"]["after"] for name, rows in report["categories"].items()}
    change = {side: report["change"][side] for side in ("inside", "outside")}
    return figures | {"change": change, "images": report["counts"]["images"], "categories_after": categories}


def row(name: str, figures: dict) -> str:
    shares = [
        f"{100 * x['before']:.1f} % → {100 * x['after']:.1f} %"
        for x in (figures[key] for key in ("judge", "detector", "plain"))
    ]
    before, after = (figures["fidelity"][side] for side in ("before", "after"))
    fidelity = f"{before:.2f} → {after:.2f} ({100 * (after / before - 1):+.1f} %)"
    diversity = " / ".join(signed(figures[f"diversity_{feature}"]) for feature in ("pixels", "CLIP"))
    change = " / ".join("-" if x is None else f"{x:.3f}" for x in figures["change"].values())
    return "| " + " | ".join([name, *shares, fidelity, diversity, change]) + " |"


def signed(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.1f} %"


def summary_row(all_figures: list[dict]) -> str:
    """Means over the seeds and, in brackets, the lowest and the highest."""

    def spread(values: list, form: str) -> str:
        if any(value is None for value in values):
            return "-"
        low, mean, high = (format(x, form) for x in (min(values), statistics.fmean(values), max(values)))
        return f"{mean} ({low} to {high})"

    def column(key: str, side: str) -> list[float]:
        return [figures[key][side] for figures in all_figures]

    cells = [f"mean of {len(all_figures)} (range)"]
    for key in ("judge", "detector", "plain"):
        before, after = ([100 * x for x in column(key, side)] for side in ("before", "after"))
        cells.append(f"{statistics.fmean(before):.1f} % → {spread(after, '.1f')} %")
    gains = [
        100 * (after / before - 1) for before, after in zip(column("fidelity", "before"), column("fidelity", "after"))
    ]
    cells.append(f"{spread(gains, '+.1f')} %")
    diversity = [
        spread(
            [None if x is None else 100 * x for x in (figures[f"diversity_{name}"] for figures in all_figures)], "+.1f"
        )
        for name in ("pixels", "CLIP")
    ]
    cells.append(" / ".join(f"{text} %" if text != "-" else text for text in diversity))
    cells.append(" / ".join(spread(column("change", side), ".3f") for side in ("inside", "outside")))
    return "| " + " | ".join(cells) + " |"


def table(cells: list[dict]) -> str:
    """Markdown: a row for each seed, then mean and range."""
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    lines += [row(f"seed {cell['seed']}", cell["figures"]) for cell in cells]
    if len(cells) > 1:
        lines.append(summary_row([cell["figures"] for cell in cells]))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46], help="of training (%(default)s)")
    parser.add_argument("--split", choices=["final", "development"], default="final", help="prompts of the report")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a run (default: all processors)")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks/results/miniature_seeds", help="for the cells"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/miniature_seeds", help="for LoRAs and reports")
    args, flags = parser.parse_known_args(argv)
    cells = [run_cell(seed, args.split, args.threads, flags, args.results, args.runs) for seed in args.seeds]
    images = sorted({cell["figures"]["images"] for cell in cells})
    print(
        f"\n{args.split} split, {' and '.join(map(str, images))} images a run, {' '.join(flags) or 'the recipe as it is'}\n"
    )
    print(table(cells))
    for key in ("commit", "torch", "processor"):
        found = sorted({str(cell[key]) for cell in cells})
        print(f"\n{key}: {', '.join(found)}" + (" (not the same for all rows)" if len(found) > 1 else ""), end="")
    print()
    return cells


if __name__ == "__main__":
    main()
