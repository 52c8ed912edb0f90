# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A stage as a step of datatrove, whose executors run tasks on one machine, under Slurm or on Ray (extra `cluster`).

    SlurmPipelineExecutor([StageStep(stage, shards, "labelled")], tasks=len(shards), time="02:00:00", partition="gpu").run()

A task that failed or was killed is run again by running the executor again; what it had finished is not done twice.
"""

import os
from collections.abc import Sequence

from datatrove.pipeline.base import PipelineStep

from .shards import Shard
from .stage import Stage, run_stage


class StageStep(PipelineStep):
    """Task `rank` of `world_size` does the shards `rank`, `rank + world_size`, ... of a stage, see [`run_stage`].

    Args:
        stage: what to do.
        shards: of the input. With as many tasks as shards a task that is killed loses at most one.
        output_dir: folder of the new dataset, on a disk that all machines share.
        workers: processes of a task.
    """

    type = "diffdoctor"

    def __init__(self, stage: Stage, shards: Sequence[Shard], output_dir: str | os.PathLike, workers: int = 1):
        super().__init__()
        self.name = stage.name
        self.stage, self.shards, self.output_dir, self.workers = stage, list(shards), os.fspath(output_dir), workers

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        options = {"workers": self.workers, "rank": rank, "world_size": world_size, "show_progress": False}
        run_stage(self.stage, self.shards, self.output_dir, **options)
        self.stat_update("shards", value=len(self.shards[rank::world_size]), unit="shard")
        yield from data or ()
