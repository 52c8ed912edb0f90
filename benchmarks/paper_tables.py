# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The tables of the paper (DiffDoctor, arXiv 2501.12382) beside ours, in miniature.

    python benchmarks/paper_tables.py --table 1                         # three seeds of each rung: hours on two cores
    python benchmarks/paper_tables.py --table 1 --rungs annotated photos --seeds 0

A table is a grid of cells, each a file in benchmarks/results/; a cell that exists is not computed again, so that a grid grows over
several runs. What cells are made from (datasets, detectors) is kept in benchmarks/.cache.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path

import diagnose_table
import torch


ROOT = Path(__file__).parents[1]

# The paper's rows: on generated images mean squared error, KL (misses) and KL(1-) (false alarms); on photographs the first and last.
PUBLISHED = {
    "annotated": ("RichHF-trained", 1.601, 1.059, 7.044, 0.979, 6.082),
    "photos": ("+ real photos", 1.167, 1.111, 4.803, 0.029, 1.558),
    "mined": ("+ hard cases", 0.504, 0.981, 2.983, 0.003, 0.458),
    "dynamic": ("+ pseudo-labels 1M", 0.337, 1.004, 2.231, 0.002, 0.371),
}
COLUMNS = {
    "MSE": ("generated", "all", "mse", 1e3),
    "KL": ("generated", "all", "kl_misses", 1e3),
    "KL(1-)": ("generated", "all", "kl_false_alarms", 1e3),
    "MSE photos": ("photographs", "all", "mse", 1e3),
    "KL(1-) photos": ("photographs", "all", "kl_false_alarms", 1e3),
    "pixel AP %": ("generated", "all", "pixel_ap", 100),
    "misses %": ("generated", "all", "misses", 100),
    "false alarms %": ("generated", "all", "false_alarms", 100),
    "photos blamed %": ("photographs", "all", "false_alarms", 100),
    "small misses %": ("small generated", "all", "misses", 100),
    "small photos blamed %": ("small photographs", "all", "false_alarms", 100),
}


def table_1(rungs: list[str], seeds: list[int], settings: diagnose_table.Settings, results: Path, cache: Path) -> None:
    rows = {}
    for seed in seeds:  # a whole ladder first, then the next seed
        for rung in rungs:
            rows.setdefault(rung, []).append(diagnose_table.cell(rung, seed, settings, results, cache))
            print(f"{rung}, seed {seed}: {line(rows[rung][-1:])}", flush=True)
    print(f"\nMean (lowest to highest) of {len(seeds)} seeds; errors and divergences times 1000.\n")
    print("| rung | " + " | ".join(COLUMNS) + " | published: MSE, KL, KL(1-), MSE photos, KL(1-) photos |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for rung, cells in rows.items():
        published = PUBLISHED.get(rung)
        told = "" if published is None else f"{published[0]}: {', '.join(f'{value:.3f}' for value in published[1:])}"
        print(f"| {rung} | {line(cells)} | {told} |")


def line(cells: list[dict]) -> str:
    found = []
    for part, group, name, factor in COLUMNS.values():
        values = [factor * cell["figures"][part][group][name] for cell in cells]
        spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
        found.append(f"{statistics.mean(values):.1f}{spread}")
    return " | ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, choices=(1,), required=True)
    parser.add_argument("--rungs", nargs="+", choices=diagnose_table.RUNGS, default=list(diagnose_table.RUNGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--threads", type=int, default=2, help="of torch; not part of a cell's settings (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/table1")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks/.cache/table1")
    for field in dataclasses.fields(diagnose_table.Settings):
        parser.add_argument(
            f"--{field.name}", type=type(field.default), default=field.default, help="(default: %(default)s)"
        )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = [field.name for field in dataclasses.fields(diagnose_table.Settings)]
    settings = diagnose_table.Settings(**{name: getattr(args, name) for name in names})
    table_1(args.rungs, args.seeds, settings, args.results, args.cache)


if __name__ == "__main__":
    main()
