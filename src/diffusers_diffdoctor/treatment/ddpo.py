# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Policy gradients on a pipeline: DDPO (arXiv 2305.13301) and, on flow models, Flow-GRPO (arXiv 2505.05470).

A rollout draws images with noise in every step and scores them. Its updates then make the steps likelier that led to images better
than expected, one step's graph at a time. The reward is only ever asked for numbers.

What is left out on purpose: a value function, and training of other weights than a LoRA's.
"""

import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import TrainerCallback, is_datasets_available
from transformers.utils import logging

from ..files import write_atomically
from ..rollout.placement import window_length
from ..rollout.stochastic import StochasticRollout, Trajectory
from ..seeds import derive_seed
from ..training.record import missing_entries_named
from .adapter import save_lora
from .base import TreatmentTrainer
from .config import TreatmentConfig, _require
from .examine import diagnose_maps
from .policy import ScoreHistory, clipped_objective, group_advantages, normalised
from .prepare import RewardFunc, build_rollout


if is_datasets_available():
    from datasets import Dataset

logger = logging.get_logger(__name__)

ADVANTAGES = ("prompt", "running", "rollout")
POLICY_FILE = "policy.json"  # the scores that a resumed run goes on from
DRAWING_LORA_FILE = "drawing_lora_weights.safetensors"  # the weights that a rollout half used was drawn with


@dataclass
class DDPOConfig(TreatmentConfig):
    r"""
    Configuration of the [`DDPOTrainer`]: a [`~diffusers_diffdoctor.treatment.TreatmentConfig`] with what follows.

    One rollout draws `per_device_train_batch_size * gradient_accumulation_steps * processes * updates_per_pass` images, and
    `updates_per_pass * passes` updates are made of it.

    Parameters:
        > Parameters that control what is drawn

        noise_level (`float`, *optional*):
            How much noise a step adds. Flow models: the a of Flow-GRPO, above 0 (0.7 without it, as in its code). All others: the
            eta of DDIM, in (0, 1] (1 without it, as in DDPO).
        num_images_per_prompt (`int`, *optional*, defaults to `4`):
            Images that one rollout draws of a prompt, which are compared with each other (Flow-GRPO: 24).
        updates_per_pass (`int`, *optional*, defaults to `1`):
            Into how many updates the images of a rollout are divided (DDPO: 2).
        passes (`int`, *optional*, defaults to `1`):
            How often every image of a rollout is used (DDPO: 1, its "inner epochs").

        > Parameters that control the loss, `clipped objective + kl_weight * KL`

        advantages (`str`, *optional*, defaults to `"prompt"`):
            With what a score is compared: with those of the same prompt in the rollout (`"prompt"`, Flow-GRPO), with the last
            `history_size` of the same prompt (`"running"`, DDPO), or with the whole rollout (`"rollout"`).
        history_size (`int`, *optional*, defaults to `32`):
            Scores that `"running"` keeps for each prompt (DDPO).
        history_minimum (`int`, *optional*, defaults to `16`):
            With fewer scores than that, `"running"` compares with the whole rollout (DDPO).
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Largest absolute advantage, above 0 (DDPO, Flow-GRPO).
        clip_range (`float`, *optional*, defaults to `1e-4`):
            How far the ratio of likelihoods may leave 1 before its gradient is cut, above 0 (DDPO, Flow-GRPO: log-likelihoods
            are means over the elements, so that ratios hardly leave 1).
        kl_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the KL divergence from the pipeline without its adapter, at least 0 (Flow-GRPO: 0.04 and less; DDPO
            has none). Above 0, every trained step is also taken without the adapter.
        timestep_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the steps with noise that each update trains, drawn anew for each, in (0, 1]; rounded up.

    Other defaults than those of the base: `num_inference_steps` 10 (Flow-GRPO's training), `learning_rate` 3e-4 (both), and
    `metric_for_best_model` `"reward"` where one is needed. `lora_dropout` must be 0: it would change likelihoods at random.
    """

    noise_level: float | None = field(
        default=None,
        metadata={"help": "Noise of a step: a of Flow-GRPO (0.7 without it), or eta of DDIM (1 without it)."},
    )
    num_images_per_prompt: int = field(default=4, metadata={"help": "Images that a rollout draws of each prompt."})
    updates_per_pass: int = field(
        default=1, metadata={"help": "Updates that the images of a rollout are divided into (DDPO: 2)."}
    )
    passes: int = field(default=1, metadata={"help": "How often every image of a rollout is used (DDPO: 1)."})
    advantages: str = field(
        default="prompt",
        metadata={
            "help": "A score is compared with those of its prompt (prompt, running) or of the rollout (rollout)."
        },
    )
    history_size: int = field(default=32, metadata={"help": "Scores that `running` keeps for each prompt."})
    history_minimum: int = field(
        default=16, metadata={"help": "With fewer scores `running` compares with the whole rollout."}
    )
    advantage_clip: float = field(default=5.0, metadata={"help": "Largest absolute advantage."})
    clip_range: float = field(
        default=1e-4, metadata={"help": "How far the ratio of likelihoods may leave 1 before its gradient is cut."}
    )
    kl_weight: float = field(
        default=0.0, metadata={"help": "Weight of the KL divergence from the pipeline without its adapter."}
    )
    timestep_fraction: float = field(
        default=1.0, metadata={"help": "Share of the steps with noise that each update trains, in (0, 1]."}
    )

    # --- other defaults than those of the base
    num_inference_steps: int = field(default=10, metadata={"help": "Denoising steps of one image, at least 2."})
    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate (DDPO, Flow-GRPO: 3e-4)."})

    best_metric = "reward"

    def _check(self) -> None:
        super()._check()
        _require(self, "num_inference_steps", self.num_inference_steps >= 2, "at least 2: the last step adds no noise")
        for name in ("num_images_per_prompt", "updates_per_pass", "passes", "history_size", "history_minimum"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("advantage_clip", "clip_range"):
            _require(self, name, math.isfinite(getattr(self, name)) and getattr(self, name) > 0, "finite and above 0")
        _require(self, "kl_weight", math.isfinite(self.kl_weight) and self.kl_weight >= 0, "finite and at least 0")
        _require(self, "timestep_fraction", 0 < self.timestep_fraction <= 1, "in (0, 1]")
        _require(self, "advantages", self.advantages in ADVANTAGES, f"one of {ADVANTAGES}")
        _require(self, "history_minimum", self.history_minimum <= self.history_size, "at most `history_size`")
        _require(self, "lora_dropout", self.lora_dropout == 0, "0: it would change the likelihoods at random")
        if self.advantages == "prompt" and self.num_images_per_prompt == 1:
            raise ValueError(
                "`num_images_per_prompt` is 1, and `advantages='prompt'` compares the images of a prompt with each other: "
                "nothing would be learnt. Raise it, or choose 'running' or 'rollout'."
            )
        images, count = self.images_per_rollout, self.num_images_per_prompt
        if images % count:
            raise ValueError(
                f"`num_images_per_prompt` is {count}, but a rollout draws {images} images (`per_device_train_batch_size` x "
                "`gradient_accumulation_steps` x processes x `updates_per_pass`), which it does not divide."
            )

    @property
    def images_per_rollout(self) -> int:
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return batch * self.world_size * self.updates_per_pass


class RolloutOrder(Sampler):
    """Which prompt every image of a run is drawn of: a pure function of its position, so that nothing of it is stored.

    An epoch draws `num_images_per_prompt` images of every prompt, in rollouts of equal size; the last one is filled up from another
    order of the prompts. Iterating gives the rows of an epoch in the order of the updates, each as often as it is used.

    Args:
        prompts: how many there are.
        args: the configuration.
    """

    def __init__(self, prompts: int, args: DDPOConfig):
        self.prompts, self.args, self.epoch = prompts, args, 0
        self.groups = args.images_per_rollout // args.num_images_per_prompt  # of one rollout
        self.rollouts = math.ceil(prompts / self.groups)  # of one epoch

    def row(self, position: int) -> int:
        """The row of the image at a position of the run, counted over all processes without repetitions."""
        group = position // self.args.num_images_per_prompt
        epoch, group = divmod(group, self.rollouts * self.groups)
        again, place = divmod(group, self.prompts)
        return self._order(epoch, again)[place]

    def _order(self, epoch: int, again: int) -> list[int]:
        order = list(range(self.prompts))
        if self.args.train_sampling_strategy != "sequential":
            random.Random(derive_seed(self.args.data_seed, "prompts", epoch, again)).shuffle(order)
        return order

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rollouts * self.args.images_per_rollout * self.args.passes

    def __iter__(self) -> Iterator[int]:
        size = self.args.images_per_rollout
        for rollout in range(self.epoch * self.rollouts, (self.epoch + 1) * self.rollouts):
            rows = [self.row(rollout * size + i) for i in range(size)]
            yield from rows * self.args.passes


@dataclass
class Block:
    """What one forward pass trains on: the images of a batch, in the calls that drew them, and their advantages."""

    trajectories: list[Trajectory]
    positions: list[int]  # in the run, in the order of the trajectories
    advantages: torch.Tensor | None = None

    @property
    def prompts(self) -> list[str]:
        return [prompt for trajectory in self.trajectories for prompt in trajectory.prompts]

    @property
    def seeds(self) -> list[int]:
        return [seed for trajectory in self.trajectories for seed in trajectory.seeds]


@dataclass
class Rollout:
    """The images of one rollout that this process drew.

    Attributes:
        number: which of the run it is.
        blocks: in the order of their use.
        scores, advantages: of all processes, in the order of their positions.
        drawn_with: the trained weights at the time, where updates will follow that need the rollout again.
    """

    number: int
    blocks: list[Block]
    scores: list[float]
    advantages: list[float]
    drawn_with: list[torch.Tensor]


class DDPOTrainer(TreatmentTrainer):
    """
    Trainer that raises the reward of a pipeline's images by policy gradient, through a LoRA on its denoiser.

    The reward is asked for numbers alone: a function of another library, an HTTP endpoint, a count of objects. See the page
    "Policy gradients and preferences" for the maths, what is logged, and what it costs.

    ```python
    trainer = DDPOTrainer(
        pipeline="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs=lambda images, prompts: [float(image.mean()) for image in images],
        args=DDPOConfig(output_dir="brighter"),
        train_dataset=Dataset.from_dict({"prompt": ["a hand holding a cup"]}),
    )
    trainer.train()
    trainer.save_model()
    ```

    Evaluation draws held-out prompts as the pipeline itself does, without noise in its steps.

    Args:
        pipeline, train_dataset, eval_dataset, peft_config, judge, compute_metrics, callbacks, optimizers:
            see [`PixelRewardTrainer`].
        reward_funcs (`Callable`, `torch.nn.Module` or a list of them):
            What scores an image, higher is better; see [`PixelRewardTrainer`]. Need not be differentiable.
        args ([`DDPOConfig`], *optional*):
            The configuration.

    Raises:
        ValueError: an argument that cannot work, a scheduler whose steps have no known likelihood; the message names it, the
            value found and what to do.
        FloatingPointError: during training, a reward, loss or gradient that is not finite, before it reaches the weights.
    """

    config_class = DDPOConfig
    _tag_names = [*TreatmentTrainer._tag_names, "ddpo"]
    _name = "DDPO"
    _method = (
        "rewards scored generated images, and the denoising steps that led to those better than expected were made likelier, "
        "by the policy gradient of [DDPO](https://huggingface.co/papers/2305.13301), whose steps on flow models are those of "
        "[Flow-GRPO](https://huggingface.co/papers/2505.05470)"
    )
    private = (*TreatmentTrainer.private, DRAWING_LORA_FILE, POLICY_FILE)
    outputs = (*TreatmentTrainer.outputs, POLICY_FILE)

    def __init__(
        self,
        pipeline: str | os.PathLike | DiffusionPipeline,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: DDPOConfig | None = None,
        train_dataset: "Dataset | None" = None,
        eval_dataset: "Dataset | dict[str, Dataset] | None" = None,
        peft_config: PeftConfig | None = None,
        judge: Any | None = None,
        compute_metrics: Callable[[torch.Tensor, Sequence[str]], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        super().__init__(
            pipeline,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            peft_config,
            judge,
            compute_metrics,
            callbacks,
            optimizers,
        )
        if getattr(self.peft_config, "lora_dropout", 0):
            raise ValueError(
                f"`peft_config` has the lora_dropout {self.peft_config.lora_dropout}, but must have 0: it would change the "
                "likelihoods at random."
            )
        self.order = RolloutOrder(len(self.train_dataset), self.args)
        self._forget_rollouts()
        self.plan = self._plan()
        logger.info(self.plan)

    # --- setup -------------------------------------------------------------------------------------------------------------

    def check_before_loading(self, args: DDPOConfig) -> None:
        if not any(self.reward.weights):
            raise ValueError(f"`reward_weights` is {self.reward.weights}: nothing would be learnt. Raise one of them.")

    def build_rollout(self, args: DDPOConfig) -> StochasticRollout:
        return build_rollout(self.pipeline, args, StochasticRollout, noise_level=args.noise_level)

    def _plan(self) -> str:
        args, count = self.args, sum(parameter.numel() for parameter in self.trained_parameters)
        return (
            f"Policy gradient on {self.base['pipeline'] or 'a loaded pipeline'} ({self.base['pipeline_class']}): "
            f"{len(self.train_dataset)} prompts, rollouts of {args.images_per_rollout} images of "
            f"{self.rollout.height}x{self.rollout.width} pixels, {args.num_images_per_prompt} of a prompt, in "
            f"{args.num_inference_steps} steps with noise level {self.rollout.noise_level}; "
            f"{args.updates_per_pass * args.passes} updates per rollout, each of "
            f"{args.images_per_rollout // args.updates_per_pass} images in "
            f"{window_length(args.timestep_fraction, args.num_inference_steps - 1)} steps, {count:,} trained weights in "
            f"{len(self.trained_parameters)} tensors."
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return self.order

    def train(self, *args, **kwargs):
        self._forget_rollouts()
        return super().train(*args, **kwargs)

    def _forget_rollouts(self) -> None:
        self._rollout: Rollout | None = None
        self._resumed_rollout: dict[str, Any] | None = None  # scores and folder of one that a checkpoint cut in two
        self._history = ScoreHistory(self.args.history_size, self.args.history_minimum)

    # --- a rollout -----------------------------------------------------------------------------------------------------------

    def _place(self) -> tuple[int, int, int]:
        """Of the next update: which rollout it uses, in which pass, and which part."""
        number, update = divmod(self.state.global_step, self.args.updates_per_pass * self.args.passes)
        return number, *divmod(update, self.args.updates_per_pass)

    def blocks(self, count: int) -> range:
        """The batches of the next update, counted over all processes without repetitions."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        number, _, part = self._place()
        first = (number * self.args.updates_per_pass + part) * self.args.gradient_accumulation_steps
        return range(first * world + rank, (first + count) * world + rank, world)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Draw a new rollout where the last one is used up."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        number, _, part = self._place()
        if batches and (self._rollout is None or self._rollout.number != number):
            self._rollout = None  # its memory is needed for the next
            self._rollout = self._draw_rollout(number)
        for i, batch in enumerate(batches):
            batch["block"] = part * self.args.gradient_accumulation_steps + i
        return batches, count

    def _draw_rollout(self, number: int) -> Rollout:
        """Draw, score and compare. One that a checkpoint cut in two is drawn again with the weights of its time."""
        resumed = self._resumed_rollout
        if resumed is not None and (resumed["settings"] != self._settings() or resumed["number"] != number):
            resumed = None
        self._resumed_rollout = None
        weights = nullcontext() if resumed is None else self._loaded_weights(resumed["folder"] / DRAWING_LORA_FILE)
        again = self.args.updates_per_pass * self.args.passes > 1
        with weights:
            drawn_with = [value.detach().clone() for value in self.trained_parameters] if again else []
            blocks, figures = self._draw_blocks(number, scored=resumed is None)
        if resumed is None:
            positions, prompts, figures = (list(column) for column in zip(*sorted(gather_object(figures))))
            self._check_scores(figures, prompts, positions)
            scores = [figure["reward"] for figure in figures]
            advantages = self._compare(torch.tensor(scores, dtype=torch.float64), prompts).tolist()
            for name in figures[0]:
                values = torch.tensor([figure[name] for figure in figures], device=self.args.device)
                self._metrics[name].append(values.mean())
                if name == "reward":
                    self._metrics["reward_std"].append(values.std(correction=0))
        else:
            scores, advantages = resumed["scores"], resumed["advantages"]
        start = number * self.args.images_per_rollout
        for block in blocks:
            chosen = [advantages[position - start] for position in block.positions]
            block.advantages = torch.tensor(chosen, dtype=torch.float32, device=self.args.device)
        return Rollout(number, blocks, scores, advantages, drawn_with)

    def _draw_blocks(self, number: int, scored: bool) -> tuple[list[Block], list[tuple[int, str, dict[str, float]]]]:
        """This process's batches, and of each image its position, prompt and figures."""
        args, rank, world = self.args, self.accelerator.process_index, self.accelerator.num_processes
        count, was_training = args.updates_per_pass * args.gradient_accumulation_steps, self.rollout.training
        blocks, figures = [], []
        self.rollout.eval()
        shown = tqdm(range(count), desc="Drawing", leave=False, disable=args.disable_tqdm or rank > 0)
        try:
            with self._memory_errors_explained("evaluation"), self.accelerator.autocast():
                for i in shown:
                    first = ((number * count + i) * world + rank) * self._train_batch_size
                    positions = list(range(first, first + self._train_batch_size))
                    prompts = [self.train_dataset[self.order.row(position)]["prompt"] for position in positions]
                    seeds = [derive_seed(args.seed, "rollout", position) for position in positions]
                    trajectories = self.rollout.sample(prompts, seeds)
                    ordered = [positions[row] for trajectory in trajectories for row in trajectory.rows]
                    blocks.append(Block(trajectories, ordered))
                    if scored:
                        found = [each for trajectory in trajectories for each in self._score(trajectory)]
                        figures += zip(ordered, blocks[-1].prompts, found)
                    for trajectory in trajectories:
                        trajectory.images = None  # scored, and of no further use
        finally:
            self.rollout.train(was_training)
        return blocks, figures

    @torch.no_grad()
    def _score(self, trajectory: Trajectory) -> list[dict[str, float]]:
        output = self.reward(trajectory.images.to(self.args.device), trajectory.prompts)
        figures = {"reward": output.score} | {f"rewards/{name}": score for name, score in output.parts.items()}
        figures |= {} if output.map is None else diagnose_maps(output.map)
        return [{name: values[i].item() for name, values in figures.items()} for i in range(len(trajectory.prompts))]

    def _check_scores(self, figures: list[dict[str, float]], prompts: list[str], positions: list[int]) -> None:
        bad = [i for i, figure in enumerate(figures) if not math.isfinite(figure["reward"])]
        if bad:
            seeds = [derive_seed(self.args.seed, "rollout", positions[i]) for i in bad[:4]]
            named = ", ".join(f"{prompts[i]!r} (seed {seed})" for i, seed in zip(bad, seeds))
            raise FloatingPointError(
                f"The reward is {figures[bad[0]]['reward']} for {named}: {len(bad)} of {len(figures)} images have none that "
                "can be compared. The weights were not updated. Return a finite number for every image, a low one for those that "
                "cannot be scored."
            )

    def _compare(self, scores: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """The advantages of a rollout, (N,)."""
        kind, clip = self.args.advantages, self.args.advantage_clip
        if kind == "prompt":
            found = group_advantages(scores, prompts)
        elif kind == "running":
            found = self._history.advantages(scores, prompts)
        else:
            found = normalised(scores)
        return found.clamp(-clip, clip)

    # --- one step ------------------------------------------------------------------------------------------------------------

    def trained_steps(self, trajectory: Trajectory) -> list[int]:
        """The steps that the next update trains, the same for all of its images."""
        noisy = trajectory.noisy_steps
        count = window_length(self.args.timestep_fraction, len(noisy))
        return sorted(
            random.Random(derive_seed(self.args.seed, "timesteps", self.state.global_step)).sample(noisy, count)
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean of `clipped objective + kl_weight * KL` over the trained steps, one after the other: of all but the last, the
        gradient is already there when this returns."""
        block = self._rollout.blocks[inputs["block"]]
        steps = self.trained_steps(block.trajectories[0])
        done = 0.0
        for step in steps[:-1]:
            with self.accelerator.no_sync(model):
                loss = self._step_loss(model, block, step, num_items_in_batch) / len(steps)
                self.accelerator.backward(loss)
            done = done + loss.detach()
        loss = self._step_loss(model, block, steps[-1], num_items_in_batch) / len(steps) + done
        self._samples += zip(block.prompts, block.seeds)
        return (loss, None) if return_outputs else loss

    def _step_loss(self, model: Any, block: Block, step: int, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        args = self.args
        now = model(block.trajectories, step=step, reference=args.kl_weight > 0)
        before = torch.cat([trajectory.log_probs[step] for trajectory in block.trajectories]).to(now.log_probs.device)
        change = now.log_probs - before
        ratio = change.exp()
        objective = clipped_objective(ratio, block.advantages, args.clip_range)
        self.stop_if_not_finite("policy", objective, block.prompts, block.seeds)
        metrics = {
            "loss/policy": objective,
            "policy/approx_kl": 0.5
            * change.square(),  # as DDPO's code tells how far the policy has moved since the rollout
            "policy/clip_fraction": ((ratio - 1).abs() > args.clip_range).float(),
        }
        if now.divergence is not None:
            self.stop_if_not_finite("KL", now.divergence, block.prompts, block.seeds)
            objective = objective + args.kl_weight * now.divergence
            metrics["loss/kl"] = now.divergence
        self.note(metrics, [], [])
        return self.share_of_mean(objective, num_items_in_batch)

    # --- checkpoints ---------------------------------------------------------------------------------------------------------

    def _settings(self) -> list[int]:
        """What a rollout cut in two must share with the run that goes on."""
        args = self.args
        return [args.images_per_rollout, args.num_images_per_prompt, args.updates_per_pass, args.passes, args.seed]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Also what a resumed run needs: the running statistics, and of a rollout that is half used the scores and the weights
        that it was drawn with."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call or not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        state: dict[str, Any] = {"history": self._history.scores, "rollout": None}
        rollout = self._rollout
        if rollout is not None and rollout.number == self._place()[0]:
            state["rollout"] = {
                "number": rollout.number,
                "settings": self._settings(),
                "scores": rollout.scores,
                "advantages": rollout.advantages,
            }
            with self._weights(rollout.drawn_with):
                save_lora(self.pipeline, self.rollout.denoiser_name, folder, DRAWING_LORA_FILE)
        write_atomically(folder / POLICY_FILE, json.dumps(state) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint, POLICY_FILE)
        if not path.is_file():
            raise ValueError(
                f"{str(path.parent)!r} is no checkpoint of a {type(self).__name__}: it has no {POLICY_FILE}."
            )
        with missing_entries_named(path):
            state = json.loads(path.read_text(encoding="utf-8"))
            self._history = ScoreHistory(self.args.history_size, self.args.history_minimum, state["history"])
            if state["rollout"] is not None:
                self._resumed_rollout = {**state["rollout"], "folder": path.parent}

    @contextmanager
    def _weights(self, values: Sequence[torch.Tensor]) -> Iterator[None]:
        """The trained weights have these values inside the block."""
        live = [parameter.detach().clone() for parameter in self.trained_parameters]
        try:
            for parameter, value in zip(self.trained_parameters, values):
                parameter.data.copy_(value)
            yield
        finally:
            for parameter, value in zip(self.trained_parameters, live):
                parameter.data.copy_(value)

    @contextmanager
    def _loaded_weights(self, path: Path) -> Iterator[None]:
        with self._weights(self.trained_parameters):
            self._load_lora(path)
            yield
