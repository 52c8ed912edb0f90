# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The arguments of treatment; the defaults are the paper's treatment of FLUX.1-schnell (arXiv 2501.12382)."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..rollout.placement import Placement, placement_of
from ..training import RunArguments


LOWER_IS_BETTER = ("artifact_frequency", "max_confidence", "area_ratio", "loss")
PIXEL_SELECTIONS = ("threshold", "mean", "max")
ON_ALARM = ("log", "stop", "rollback")
QUANTIZATIONS = ("int8", "nf4")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class TreatmentConfig(RunArguments):
    r"""
    What the configurations of all trainers that treat a pipeline have in common.

    It has only what is particular to treatment; everything else (batch size, steps, optimizer, schedule, logging,
    checkpoints, evaluation strategy, Hub) is a [`~transformers.TrainingArguments`], or a
    [`~diffusers_diffdoctor.training.RunArguments`] (stopping, overwriting). Where "paper" is said, the value is
    the one of arXiv 2501.12382; where "ours", the paper leaves it open.

    Parameters:
        > Parameters that control the rollout

        num_inference_steps (`int`, *optional*, defaults to `4`):
            Denoising steps of one image, at least 1 (paper: 4 for FLUX.1-schnell).
        height, width (`int`, *optional*):
            Size of the images in pixels. The pipeline's default without them.
        resolution (`int`, *optional*):
            Short for equal `height` and `width`.
        guidance_scale (`float`, *optional*):
            Passed to the pipeline. The pipeline's default without it.
        max_sequence_length (`int`, *optional*):
            Longest prompt in tokens, for pipelines that take it.
        pipeline_kwargs (`dict` or JSON `str`, *optional*):
            Further arguments of every call of the pipeline, such as `{"negative_prompt": "blurry"}`.
        pipeline_dtype (`str`, *optional*):
            `"float32"`, `"bfloat16"` or `"float16"`: the type in which a pipeline given by name is loaded. Follows the mixed
            precision by default. The trained LoRA weights are float32 in any case.

        base_lora (`str`, *optional*):
            A LoRA that the pipeline wears while it is treated, such as one of a person, a thing or a style: a folder, a file or an
            id on the Hub. It is merged into the pipeline before anything else, and has to be merged again where the treatment is
            used, as the model card shows (ours).
        base_lora_scale (`float`, *optional*, defaults to `1.0`):
            With which it is merged.

        > Parameters that control the rewards

        pixel_selection (`str`, *optional*, defaults to `"threshold"`):
            Which pixels of the artifact map are penalised: those above the threshold, all (`"mean"`) or the highest
            (`"max"`) (paper, section 3.3 and ablation).
        pixel_threshold (`float`, *optional*, defaults to `0.1`):
            The threshold, in [0, 1) (paper).
        pixel_clean_level (`float`, *optional*, defaults to `0.0`):
            An image whose pixel penalty is below this is clean enough and gives no gradient, in [0, 1). With 0 (paper) that is
            only one without a pixel above `pixel_threshold`.
        reward_weights (`list[float]`, *optional*):
            One weight for each reward function; 1 each without it.

        > Parameters that control the pipeline's own training loss, where a trainer asks for it

        offline_sigmas (`str`, *optional*, defaults to `"logit_normal"`):
            How the training loss of flow models draws its noise level, or `"uniform"` (ours).
        offline_guidance_scale (`float`, *optional*, defaults to `1.0`):
            Embedded guidance of guidance-distilled models, such as FLUX.1-dev, in that loss (ours).

        > Parameters that control the adapter, when no `peft_config` is passed

        lora_rank (`int`, *optional*, defaults to `16`):
            Rank of the LoRA (paper).
        lora_alpha (`int`, *optional*):
            Scale of the LoRA; equal to the rank without it, because some user interfaces ignore alpha.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout before the LoRA layers, in [0, 1).
        lora_target_modules (`list[str]`, *optional*):
            Ends of the names of the layers that get an adapter. Without it they are found: the query, key, value and output
            projections of the denoiser's attention (paper: attention). For most models, FLUX and SDXL among them, that is
            `to_q to_k to_v to_out.0` (release); in FLUX it covers the image tokens of the double blocks and all tokens of
            the single blocks, and adding `add_q_proj add_k_proj add_v_proj to_add_out` the text tokens of the double blocks.
        ema_decay (`float`, *optional*):
            Decay per step, in (0, 1), of an exponential moving average of the LoRA weights (diffusers' `EMAModel`: update
            n decays by no more than n / (9 + n), and the first one by 0). With it, evaluation and the saved LoRA use the
            average.

        > Parameters that control memory

        quantization (`str`, *optional*):
            `"int8"` (torchao) or `"nf4"` (bitsandbytes, needs a GPU): how the linear layers of the denoiser and the text
            encoders of a pipeline given by name are stored. The trained LoRA weights are float32 in any case.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            Recompute the denoiser's activations in the backward pass. Gradients are the same. transformers'
            `activation_checkpointing` is the same argument.
        vae_gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            The same for the VAE decoder.
        cache_prompt_embeddings (`bool`, *optional*, defaults to `True`):
            Encode every prompt once before training. At 512 tokens of FLUX's T5 an embedding takes 4 MB of host memory for
            every process: switch it off for more than some ten thousand prompts.
        free_text_encoders (`bool`, *optional*, defaults to `True`):
            Drop the text encoders once all prompts are encoded (9.8 GB on FLUX); only with `cache_prompt_embeddings`.

        > Parameters that control evaluation

        eval_num_images (`int`, *optional*, defaults to `32`):
            Images per evaluation. Prompts are taken in order, and again with further seeds if there are fewer.
        eval_seeds_per_prompt (`int`, *optional*, defaults to `1`):
            How often a prompt is taken before the next one. From 2 on, or with fewer prompts than images, `eval_diversity` is
            measured: how much the seeds of a prompt differ.
        eval_seed (`int`, *optional*, defaults to `1234`):
            Image i of an evaluation starts from the noise of seed `eval_seed + i`, at every step and in every run.
        log_images (`int`, *optional*, defaults to `4`):
            How many of them are drawn, with heatmaps, before and after, in the picture of each evaluation. 0 for none.

        > Parameters of the guards, which look at every evaluation; see the page "Guards"

        on_alarm (`str`, *optional*, defaults to `"log"`):
            What an alarm leads to (ours): `"log"`, nothing but a warning, a line in the log and in the report; `"stop"`, the LoRA
            of the best evaluation without an alarm is put back and training stops; `"rollback"`, it is put back and training goes
            on with half the learning rate. The last two keep a copy of the LoRA in memory and in every checkpoint.
        spectral_alarm (`float`, *optional*, defaults to `3.0`):
            Alarm where a pattern that the images have in common, a grid or stripes, has grown by more than this over the untreated
            ones, in dB (ours). `None` for no alarm.
        diversity_alarm (`float`, *optional*, defaults to `0.5`):
            Alarm where the diversity between seeds is less than this share of the untreated pipeline's (ours). `None` for no alarm.
        fidelity_metric (`str`, *optional*):
            Name of a figure that says how well images fit their prompts, higher is better: one of `compute_metrics`, or
            `rewards/<name>`.
        fidelity_alarm (`float`, *optional*, defaults to `0.05`):
            Alarm where it falls by more than this share of the untreated pipeline's (ours).
        early_stopping_patience (`int`, *optional*):
            Stop after so many evaluations in a row without a better `metric_for_best_model` (transformers'
            `EarlyStoppingCallback`).

    These defaults differ from [`~transformers.TrainingArguments`]: `learning_rate` 1e-4 (paper), `lr_scheduler_type`
    `"constant"` (ours), `per_device_train_batch_size` 4 (release), `logging_steps` 10, `remove_unused_columns` `False`,
    `bf16`, which is on where a GPU supports it and off elsewhere unless it is set, and `metric_for_best_model`, which is
    `"artifact_frequency"`, or `"judge_artifact_frequency"` where the trainer has a judge, wherever one is needed; for that figure
    and its like lower is better.
    """

    best_metric = "artifact_frequency"  # where one is needed and none is named

    # --- the rollout
    num_inference_steps: int = field(default=4, metadata={"help": "Denoising steps of one image (paper: 4)."})
    height: int | None = field(default=None, metadata={"help": "Image height in pixels; default of the pipeline."})
    width: int | None = field(default=None, metadata={"help": "Image width in pixels; default of the pipeline."})
    resolution: int | None = field(default=None, metadata={"help": "Short for equal height and width."})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale passed to the pipeline; default of the pipeline."}
    )
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens, for pipelines that take it."}
    )
    pipeline_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Further arguments of the pipeline as JSON: {"negative_prompt": "blurry"}.'}
    )
    pipeline_dtype: str | None = field(
        default=None,
        metadata={"help": "float32, bfloat16 or float16 for a pipeline given by name; follows the mixed precision."},
    )

    base_lora: str | None = field(
        default=None, metadata={"help": "A LoRA that is merged into the pipeline before: it is treated with it."}
    )
    base_lora_scale: float = field(default=1.0, metadata={"help": "With which base_lora is merged."})

    # --- the rewards
    pixel_selection: str = field(
        default="threshold", metadata={"help": "Penalised pixels: threshold (paper), mean or max."}
    )
    pixel_threshold: float = field(default=0.1, metadata={"help": "Confidence that selects a pixel (paper: 0.1)."})
    pixel_clean_level: float = field(
        default=0.0,
        metadata={"help": "Pixel penalty below which an image gives no gradient; 0: only without a selected pixel."},
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight for each reward function; 1 each without it."}
    )

    # --- the pipeline's own training loss
    offline_sigmas: str = field(
        default="logit_normal", metadata={"help": "Noise levels of the training loss: logit_normal or uniform."}
    )
    offline_guidance_scale: float = field(
        default=1.0, metadata={"help": "Embedded guidance of guidance-distilled models in the training loss."}
    )

    # --- the adapter
    lora_rank: int = field(default=16, metadata={"help": "Rank of the LoRA (paper: 16)."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the LoRA; the rank without it."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the LoRA layers."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Ends of the names of the layers that get an adapter; those of the attention without it (paper)."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Decay of a moving average of the LoRA, used in evaluation and saved; none without it."},
    )

    # --- memory
    quantization: str | None = field(
        default=None,
        metadata={"help": "int8 or nf4 storage of the frozen denoiser and text encoders; none without it."},
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute the denoiser's activations in the backward pass (default: True)."}
    )
    vae_gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute the VAE decoder's activations in the backward pass."}
    )
    cache_prompt_embeddings: bool = field(
        default=True, metadata={"help": "Encode every prompt once, before training."}
    )
    free_text_encoders: bool = field(
        default=True, metadata={"help": "Drop the text encoders once all prompts are encoded."}
    )

    # --- evaluation
    eval_num_images: int = field(default=32, metadata={"help": "Images per evaluation."})
    eval_seeds_per_prompt: int = field(
        default=1, metadata={"help": "Images of a prompt before the next one; from 2 on diversity is measured."}
    )
    eval_seed: int = field(default=1234, metadata={"help": "Image i of an evaluation has the seed eval_seed + i."})
    log_images: int = field(default=4, metadata={"help": "Images in the picture of each evaluation; 0 for none."})

    # --- guards
    on_alarm: str = field(
        default="log",
        metadata={"help": "What an alarm leads to: log, stop or rollback; the last two go back to the best weights."},
    )
    spectral_alarm: float | None = field(
        default=3.0, metadata={"help": "Alarm where a grid in the images has grown by more than this, in dB."}
    )
    diversity_alarm: float | None = field(
        default=0.5, metadata={"help": "Alarm where the diversity of seeds is below this share of the untreated."}
    )
    fidelity_metric: str | None = field(
        default=None, metadata={"help": "Figure that says how well images fit their prompts; none without it."}
    )
    fidelity_alarm: float = field(
        default=0.05, metadata={"help": "Alarm where that figure falls by more than this share."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric_for_best_model."}
    )

    # --- other defaults than those of `TrainingArguments`
    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate (paper: 1e-4)."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate schedule."})
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Images per device and forward pass (release: 4)."}
    )
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Images per device in evaluation."})
    logging_steps: float = field(
        default=10, metadata={"help": "Updates between two logs; below 1, a share of all updates."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 mixed precision; by default on where a GPU supports it, off elsewhere."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Has no effect: the trainer reads the columns it knows."}
    )

    def __post_init__(self):
        self.bf16 = self._default_bf16() if self.bf16 is None else self.bf16
        # Where transformers calls it `activation_checkpointing`, that name wins, and the old one alone would warn.
        if getattr(self, "activation_checkpointing", None) is None:
            self.activation_checkpointing = self.gradient_checkpointing is not False
        self.gradient_checkpointing = self.activation_checkpointing
        # The parent would look for a loss, and think that more artifacts are better.
        picks = self.load_best_model_at_end or self.save_strategy == "best" or self.early_stopping_patience is not None
        self.best_metric_is_ours = False
        if self.metric_for_best_model is None and (
            picks or self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        ):
            self.metric_for_best_model = self.best_metric
            self.best_metric_is_ours = True
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(LOWER_IS_BETTER)
        super().__post_init__()
        self._check()

        if self.resolution is not None:
            self.height = self.height if self.height is not None else self.resolution
            self.width = self.width if self.width is not None else self.resolution
        if self.lora_alpha is None:
            self.lora_alpha = self.lora_rank
        # The order of the prompts then hangs on the arguments alone, not on what drew random numbers before.
        if self.data_seed is None:
            self.data_seed = self.seed
        if self.pipeline_dtype is None:
            self.pipeline_dtype = "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    def _default_bf16(self) -> bool:
        return not (self.fp16 or self.use_cpu) and torch.cuda.is_available() and torch.cuda.is_bf16_supported()

    def _check(self) -> None:
        for name in (
            "num_inference_steps",
            "lora_rank",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_num_images",
            "eval_seeds_per_prompt",
        ):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("height", "width", "resolution", "max_sequence_length", "lora_alpha"):
            value = getattr(self, name)
            _require(self, name, value is None or value >= 1, "at least 1, or left out")
        weights = self.reward_weights
        finite = weights is None or (
            len(weights) > 0 and all(math.isfinite(weight) and weight >= 0 for weight in weights)
        )
        _require(self, "reward_weights", finite, "a weight of at least 0 for each reward function")
        _require(self, "pixel_selection", self.pixel_selection in PIXEL_SELECTIONS, f"one of {PIXEL_SELECTIONS}")
        _require(self, "pixel_threshold", 0 <= self.pixel_threshold < 1, "in [0, 1)")
        _require(self, "pixel_clean_level", 0 <= self.pixel_clean_level < 1, "in [0, 1)")
        _require(self, "on_alarm", self.on_alarm in ON_ALARM, f"one of {ON_ALARM}")
        for name in ("spectral_alarm", "diversity_alarm"):
            value = getattr(self, name)
            _require(self, name, value is None or (math.isfinite(value) and value >= 0), "at least 0, or None")
        _require(self, "fidelity_alarm", math.isfinite(self.fidelity_alarm) and self.fidelity_alarm >= 0, "at least 0")
        patience = self.early_stopping_patience
        _require(self, "early_stopping_patience", patience is None or patience >= 1, "at least 1, or left out")
        if patience is not None and self.eval_strategy == "no":
            raise ValueError(
                f"`early_stopping_patience` is {patience}, but `eval_strategy` is 'no', so that nothing is ever measured. Set "
                "`eval_strategy` and `eval_steps`."
            )
        _require(self, "lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)")
        targets = self.lora_target_modules
        _require(
            self,
            "lora_target_modules",
            targets is None or len(targets) > 0,
            "at least one name of a layer, or left out",
        )
        _require(self, "ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "in (0, 1), or left out")
        _require(self, "log_images", self.log_images >= 0, "at least 0")
        _require(
            self,
            "pipeline_dtype",
            self.pipeline_dtype is None or self.pipeline_dtype in DTYPES,
            f"one of {tuple(DTYPES)}",
        )
        _require(
            self,
            "quantization",
            self.quantization is None or self.quantization in QUANTIZATIONS,
            f"one of {QUANTIZATIONS}, or left out",
        )
        _require(self, "base_lora_scale", math.isfinite(self.base_lora_scale), "finite")
        if self.base_lora is not None and self.quantization is not None:
            raise ValueError(
                f"`base_lora` is {self.base_lora!r} with `quantization` {self.quantization!r}: nothing can be merged into quantized "
                "weights. Leave one of them out, or save the pipeline with the LoRA merged and treat that."
            )
        if self.pipeline_kwargs is not None:
            self.pipeline_kwargs = _as_dict("pipeline_kwargs", self.pipeline_kwargs, "arguments of the pipeline")


@dataclass
class PixelRewardConfig(TreatmentConfig):
    r"""
    Configuration of the [`PixelRewardTrainer`]: a [`~diffusers_diffdoctor.treatment.TreatmentConfig`] with what follows.

    Parameters:
        > Parameters that control where gradient flows

        gradient_fraction (`float`, *optional*, defaults to `0.25`):
            Share of the last denoising steps that carry gradient, in (0, 1]; at least one step always does (paper).
        gradient_placement (`str`, *optional*, defaults to `"last"`):
            Which steps carry gradient: `"last"`, those of `gradient_fraction` (paper; DRaFT-K); `"refl"`, one of them drawn anew
            for each update (ReFL); `"alignprop"`, a window at the end of random length, up to them (AlignProp); `"draft_lv"`, the
            last one, taken again from fresh noise (DRaFT-LV); `"sparse"`, some of all, each alone (FlowBP-Sparse); `"leap"`, two of
            all, which leap to the image (LeapAlign). See the page "Where gradient flows".
        gradient_placement_kwargs (`dict` or JSON `str`, *optional*):
            What the placement takes, such as `{"steps": 3}`.

        > Parameters that control the loss, `pixel_weight * sum(w_k * reward_k) + offline_weight * offline +
        > drift_weight * drift`

        pixel_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the rewards' losses, at least 0.
        offline_weight (`float`, *optional*, defaults to `0.25`):
            Weight of the pipeline's own training loss on the regularization dataset, at least 0 (paper).
        drift_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the mean squared difference that the adapter makes to the denoiser's prediction in the early steps, at
            least 0 (ours). Above 0, seeds keep more of their own layout; every early step is also taken without the adapter.
        offline_batch_size (`int`, *optional*):
            Regularization images per device and step; `per_device_train_batch_size` without it.
    """

    # --- where gradient flows
    gradient_fraction: float = field(
        default=0.25,
        metadata={"help": "Share of the last denoising steps that carry gradient, in (0, 1] (paper: 0.25)."},
    )

    gradient_placement: str = field(
        default="last",
        metadata={
            "help": "Which steps carry gradient: last, refl, alignprop, draft_lv, sparse or leap (default: last, paper)."
        },
    )
    gradient_placement_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'What the placement takes, as JSON: {"steps": 3}.'}
    )

    # --- the loss
    pixel_weight: float = field(default=1.0, metadata={"help": "Weight of the rewards' losses."})
    offline_weight: float = field(
        default=0.25, metadata={"help": "Weight of the training loss on the regularization dataset (paper: 0.25)."}
    )
    drift_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the difference from the untreated denoiser in the early steps (ours)."},
    )
    offline_batch_size: int | None = field(
        default=None,
        metadata={"help": "Regularization images per device and step; per_device_train_batch_size without it."},
    )

    @property
    def placement(self) -> Placement:
        """Which steps carry gradient."""
        return placement_of(self.gradient_placement, self.gradient_fraction, self.gradient_placement_kwargs)

    def __post_init__(self):
        super().__post_init__()
        if self.offline_batch_size is None:
            self.offline_batch_size = self.per_device_train_batch_size

    def _check(self) -> None:
        super()._check()
        _require(
            self,
            "offline_batch_size",
            self.offline_batch_size is None or self.offline_batch_size >= 1,
            "at least 1, or left out",
        )
        for name in ("pixel_weight", "offline_weight", "drift_weight"):
            _require(
                self, name, math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, "finite and at least 0"
            )
        _require(
            self,
            "gradient_fraction",
            0 < self.gradient_fraction <= 1,
            "in (0, 1]: without a step in the window nothing would be learnt",
        )
        if self.gradient_placement_kwargs is not None:
            self.gradient_placement_kwargs = _as_dict(
                "gradient_placement_kwargs", self.gradient_placement_kwargs, "what the placement takes"
            )
        self.placement  # noqa: B018 (refuses what it cannot take)
        if self.pixel_weight == 0 and self.offline_weight == 0:
            raise ValueError(
                "`pixel_weight` and `offline_weight` are both 0: nothing would be learnt. Raise one of them."
            )


def _require(args: TreatmentConfig, name: str, condition: bool, expected: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` is {getattr(args, name)!r}, but must be {expected}.")


def _as_dict(name: str, value: dict[str, Any] | str, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` is {value!r}, which is not JSON: {error}.") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"`{name}` is {value!r}, but must be a dictionary of {what}.")
    return parsed
