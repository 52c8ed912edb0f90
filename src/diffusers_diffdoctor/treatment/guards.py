# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Guards of a run: they compare each evaluation with the untreated pipeline, raise alarms, and keep the best weights to go back to.

A detector that is trained against is cheated in the end: grids, one image for all seeds, prompts that are no longer followed. Each
of these shows in the held-out images before it shows in the loss. What guards know lies in every checkpoint, so that a resumed run
does what it would have done.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from ..evaluation.metrics import pairwise_diversity
from ..evaluation.spectrum import growth, mean_spectra
from .config import LOWER_IS_BETTER, TreatmentConfig


GUARDS_FILE = "guards.safetensors"
RATE = 0.5  # what a rollback leaves of the learning rate
THUMBNAIL = 16  # pixels of a side: diversity is of the composition, not of the texture


@dataclass(frozen=True)
class Alarm:
    """A figure of held-out images that is on the wrong side of its limit.

    Attributes:
        name: of the figure, as it is logged without "eval_".
        value, limit: both in the figure's unit.
        text: what that means, in a sentence.
    """

    name: str
    value: float
    limit: float
    text: str


@dataclass
class Untreated:
    """What is known of the images that the pipeline drew of one set of held-out prompts before its treatment."""

    figures: dict[str, float]
    count: int
    size: tuple[int, int]
    spectra: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Best:
    """The weights of the best evaluation without an alarm; step 0 is the LoRA that the run began with.

    Attributes:
        step: when they were measured.
        figure: their value of the figure that decides, None where it is not known.
        weights: one tensor for each trained parameter, on the CPU.
    """

    step: int
    figure: float | None
    weights: list[torch.Tensor]


def seed_diversity(images: torch.Tensor, prompts: Sequence[str]) -> float | None:
    """Images (B, 3, H, W) in [0, 1] -> root mean square difference of the seeds of a prompt, as thumbnails, in [0, 1].

    None where no prompt has two images. See [`~evaluation.pairwise_diversity`].
    """
    if len(set(prompts)) == len(prompts):
        return None
    rows = F.adaptive_avg_pool2d(images.float(), THUMBNAIL).flatten(1)
    return pairwise_diversity(rows / rows.shape[1] ** 0.5, prompts, "euclidean")


class Guards:
    """
    Args:
        args: `spectral_alarm`, `diversity_alarm`, `fidelity_metric`, `fidelity_alarm`, `on_alarm`.
        figure: name of the figure that says which weights are best, without "eval_".
    """

    def __init__(self, args: TreatmentConfig, figure: str):
        self.args, self.figure = args, figure
        self.greater_is_better = not figure.endswith(LOWER_IS_BETTER)
        if args.metric_for_best_model is not None:
            self.figure = args.metric_for_best_model.removeprefix("eval_")
            self.greater_is_better = bool(args.greater_is_better)
        self.start()

    def start(self) -> None:
        """Forget everything: a new run begins."""
        self.untreated: dict[str, Untreated] = {}  # by the name of the set of held-out prompts
        self.best: Best | None = None
        self.rollbacks = 0
        self.alarmed = False  # whether the newest evaluation raised an alarm that is acted on

    @property
    def keeps_weights(self) -> bool:
        return self.args.on_alarm != "log"

    # --- what is measured ----------------------------------------------------------------------------------------------------

    def measure(self, name: str, images: torch.Tensor, prompts: Sequence[str], treated: bool) -> dict[str, float]:
        """The guards' own figures of a set of held-out images, (B, 3, H, W) in [0, 1].

        The untreated ones are remembered, and `spectral_growth` is measured against them.
        """
        diversity = seed_diversity(images, prompts)
        figures = {} if diversity is None else {"diversity": diversity}
        size = tuple(images.shape[-2:])
        if min(size) < 16:
            return figures
        before, spectra = self.untreated.get(name), mean_spectra(images)
        if not treated:
            self.untreated[name] = Untreated({}, len(images), size, spectra)
        elif before is not None and (before.count, before.size) == (len(images), size):
            figures["spectral_growth"] = growth(before.spectra, spectra, len(images), size)
        return figures

    def remember(self, name: str, figures: Mapping[str, float], count: int, size: tuple[int, int]) -> None:
        """The figures of the untreated images of a set."""
        self.untreated.setdefault(name, Untreated({}, count, size)).figures = {
            figure: float(value) for figure, value in figures.items()
        }

    # --- what is thought of it -----------------------------------------------------------------------------------------------

    def alarms(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """What is wrong with the figures of an evaluation, all sets together, under the names that are logged."""
        args, found = self.args, []
        for name, before in self.untreated.items():
            prefix = f"{name}_" if name else ""

            def of(figure, before=before, prefix=prefix):
                return metrics.get(f"eval_{prefix}{figure}"), before.figures.get(figure)

            grown, _ = of("spectral_growth")
            if args.spectral_alarm is not None and grown is not None and grown > args.spectral_alarm:
                text = "the images have a pattern in common, a grid or stripes, that the untreated ones do not have"
                found.append(Alarm(f"{prefix}spectral_growth", grown, args.spectral_alarm, text))
            now, then = of("diversity")
            if args.diversity_alarm is not None and now is not None and then is not None:
                limit = args.diversity_alarm * then
                if now < limit:
                    text = "the seeds of a prompt look more alike than before the treatment"
                    found.append(Alarm(f"{prefix}diversity", now, limit, text))
            if args.fidelity_metric is not None:
                now, then = of(args.fidelity_metric)
                if now is not None and then is not None:
                    limit = then - args.fidelity_alarm * abs(then)
                    if now < limit:
                        text = "the images fit their prompts less than before the treatment"
                        found.append(Alarm(f"{prefix}{args.fidelity_metric}", now, limit, text))
        return found

    def consider(self, step: int, metrics: Mapping[str, float], weights: Sequence[torch.Tensor]) -> None:
        """Keep the weights of an evaluation without an alarm if they are not worse than the best so far."""
        figure = self._deciding(metrics)
        best = None if self.best is None else self.best.figure
        if figure is not None and not math.isfinite(figure):
            return
        better = best is None or figure is None or (figure >= best if self.greater_is_better else figure <= best)
        if better:
            self.best = Best(step, figure, [weight.detach().cpu().clone() for weight in weights])

    def _deciding(self, metrics: Mapping[str, float]) -> float | None:
        """The value of the figure that decides; its mean over the sets of held-out prompts, where each has its own."""
        if f"eval_{self.figure}" in metrics:
            return metrics[f"eval_{self.figure}"]
        names = [f"eval_{name}_{self.figure}" for name in self.untreated]
        values = [metrics[name] for name in names if name in metrics]
        return math.fsum(values) / len(values) if values else None

    # --- checkpoints ---------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike) -> None:
        if not self.untreated and self.best is None:
            return
        best = None if self.best is None else {"step": self.best.step, "figure": self.best.figure}
        tensors = {} if self.best is None else {f"weights.{i}": weight for i, weight in enumerate(self.best.weights)}
        untreated = {}
        for place, (name, seen) in enumerate(self.untreated.items()):
            tensors |= {f"spectra.{place}.{i}": spectra.contiguous() for i, spectra in enumerate(seen.spectra)}
            untreated[name] = {**asdict(seen), "spectra": len(seen.spectra)}
        state = {"rollbacks": self.rollbacks, "best": best, "untreated": untreated}
        save_file(tensors, Path(folder, GUARDS_FILE), metadata={"format": "pt", "state": json.dumps(state)})

    def load(self, folder: str | os.PathLike) -> None:
        """What [`save`] wrote; nothing where there is none, as in checkpoints of runs without evaluations."""
        self.start()
        path = Path(folder, GUARDS_FILE)
        if not path.is_file():
            return
        with safe_open(path, "pt") as opened:
            state = json.loads(opened.metadata()["state"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        self.rollbacks = state["rollbacks"]
        for place, (name, seen) in enumerate(state["untreated"].items()):
            spectra = [tensors[f"spectra.{place}.{i}"] for i in range(seen["spectra"])]
            self.untreated[name] = Untreated(seen["figures"], seen["count"], tuple(seen["size"]), spectra)
        if state["best"] is not None:
            count = sum(name.startswith("weights.") for name in tensors)
            self.best = Best(**state["best"], weights=[tensors[f"weights.{i}"] for i in range(count)])
