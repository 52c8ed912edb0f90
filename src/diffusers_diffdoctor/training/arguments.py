# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The arguments that both trainers share beside those of [`~transformers.TrainingArguments`]."""

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..names import shortened


@dataclass
class RunArguments(TrainingArguments):
    r"""
    What [`~transformers.TrainingArguments`] has, and:

    Args:
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Remove what an earlier run left in `output_dir`: all of it for a new run, what comes after the checkpoint for one
            that resumes. Without it such a folder is refused. Files that no run wrote are never touched.
        stop_grace (`float`, *optional*, defaults to 120):
            Seconds, at least 0, in which a run that gets SIGTERM or SIGINT (Ctrl-C) finishes its update and saves a checkpoint.
            When they are over, or at a second signal, it ends at once; the last whole checkpoint stays.

        push_timeout (`float`, *optional*, defaults to 1800):
            Seconds, above 0, that an upload to the Hub may take, and that a finished run waits for those under way. What has not
            arrived then is told with the command that repeats it; a run never fails because of a push.

    [`to_dict`](RunArguments.to_dict), and with it what is written into records, reports and trackers, shortens local paths and
    leaves tokens out.

    Raises:
        ValueError: an argument out of its range, or an output folder that cannot be written.
    """

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Remove what an earlier run left in the output folder (ours)."}
    )
    stop_grace: float = field(
        default=120.0,
        metadata={"help": "Seconds to finish the update and save a checkpoint after SIGTERM or SIGINT (ours)."},
    )

    push_timeout: float = field(
        default=1800.0,
        metadata={"help": "Seconds that an upload to the Hub may take, and that a finished run waits for it (ours)."},
    )

    def __post_init__(self):
        super().__post_init__()
        if not (math.isfinite(self.push_timeout) and self.push_timeout > 0):
            raise ValueError(f"`push_timeout` is {self.push_timeout!r}, but must be finite seconds, above 0.")
        if not (math.isfinite(self.stop_grace) and self.stop_grace >= 0):
            raise ValueError(f"`stop_grace` is {self.stop_grace!r}, but must be finite seconds, at least 0.")
        _check_writable(self.output_dir)

    def to_dict(self) -> dict[str, Any]:
        """The arguments for records and trackers: tokens left out, local paths shortened, see [`~names.shortened`]."""
        return shortened(super().to_dict())


def _check_writable(output_dir: str) -> None:
    """Hours of training must not end at a folder that cannot be written. Nothing is created yet."""
    folder = Path(output_dir).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"`output_dir` is {output_dir!r}, but {str(existing)!r} is a file. Choose another folder.")
    try:  # a real file: os.access says yes to root in folders that take none
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"`output_dir` is {output_dir!r}, but {str(existing)!r} cannot be written ({error.strerror}). Change its "
            "permissions, make room, or choose another folder."
        ) from error
