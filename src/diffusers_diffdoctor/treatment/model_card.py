# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The page that a treated LoRA shows on the Hub, and the way there."""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils.hub import PushInProgress

from ..evaluation import to_pil
from .examine import Sample


if TYPE_CHECKING:
    from .trainer import PixelRewardTrainer

# Never uploaded beside the LoRA: checkpoints, and folders that are not whole.
NOT_UPLOADED = ["_*", "checkpoint-*"]
RECIPE = (
    "num_inference_steps",
    "gradient_fraction",
    "guidance_scale",
    "pixel_selection",
    "pixel_threshold",
    "pixel_weight",
    "offline_weight",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "ema_decay",
    "bf16",
    "seed",
)
FIGURES = ("artifact_frequency", "max_confidence", "area_ratio", "reward")


def write_model_card(
    trainer: "PixelRewardTrainer", folder: Path, model_name: str | None, tags: list[str], metadata: dict[str, Any]
) -> None:
    """Write `folder/README.md` and the pictures it shows. `metadata` is added to the card's data where it is not None."""
    args, base = trainer.args, trainer.base["pipeline"]
    images = _save_images(folder, *trainer.before_and_after)
    prompts = [image["prompt"] for image in images] or list(
        dict.fromkeys(row["prompt"] for row in trainer.train_dataset)
    )
    widget = [{"text": image["prompt"], "output": {"url": image["after"]}} for image in images]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        # the Hub refuses a base that is not a repository's id
        base_model=base if _is_hub_id(base) else None,
        tags=list(dict.fromkeys([*trainer._tag_names, *tags])),
        widget=widget or [{"text": prompt} for prompt in prompts[:3]],
        **{key: value for key, value in metadata.items() if value is not None},
    )
    repo_id = trainer.hub_model_id or args.hub_model_id or f"your-name/{folder.name}"
    adapter = trainer.peft_config
    recipe = [(name, getattr(value := getattr(args, name), "value", value)) for name in RECIPE]
    recipe += [("height x width", f"{trainer.rollout.height} x {trainer.rollout.width} pixels")]
    targets = adapter.target_modules if isinstance(adapter.target_modules, str) else sorted(adapter.target_modules)
    recipe += [("LoRA", f"rank {adapter.r}, alpha {adapter.lora_alpha}, on {targets}")]
    weighted = zip(trainer.reward.weights, trainer.reward.names)
    recipe += [("rewards", ", ".join(f"{weight:g} x {name}" for weight, name in weighted))]
    recipe += [("updates", trainer.state.global_step), ("processes", args.world_size)]
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card_template.md")),
        model_name=model_name or folder.name,
        base_name=base or trainer.base["pipeline_class"],
        repo_id=repo_id,
        example_prompt=repr(prompts[0]),
        images=images,
        figures=_first_and_last(trainer.state.log_history),
        recipe=[(name, value) for name, value in recipe if value is not None],
        args=args,
        versions=", ".join(f"{name} {version(name)}" for name in ("diffusers", "transformers", "peft", "torch")),
        paper_id=trainer._paper["id"],
        paper_title=trainer._paper["title"],
    )
    card.save(folder / "README.md")


def _save_images(folder: Path, before: list[Sample], after: list[Sample]) -> list[dict[str, str]]:
    images = []
    for i, (old, new) in enumerate(zip(before, after)):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        names = {"before": f"images/before_{i}.png", "after": f"images/after_{i}.png"}
        for side, sample in (("before", old), ("after", new)):
            to_pil(sample.image).save(folder / names[side])
        images.append({"prompt": new.prompt.replace("|", "\\|").replace("\n", " "), **names})
    return images


def _first_and_last(log_history: list[dict[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for name in [f"{judged}{figure}" for judged in ("judge_", "") for figure in FIGURES]:
        values = [entry[f"eval_{name}"] for entry in log_history if f"eval_{name}" in entry]
        if values:
            rows.append({"name": name.replace("_", " "), "first": f"{values[0]:.4g}", "last": f"{values[-1]:.4g}"})
    return rows


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def upload(trainer: "PixelRewardTrainer", checkpoint: str) -> None:
    """Upload the output folder in the background, and the checkpoint as well where `hub_strategy` says so."""
    args = trainer.args
    running = getattr(trainer, "push_in_progress", None)
    if running is not None and not running.is_done() and not args.hub_always_push:
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    common = {
        "repo_id": trainer.hub_model_id,
        "commit_message": f"Training in progress, step {trainer.state.global_step}",
        "token": args.hub_token,
        "revision": args.hub_revision,
        "run_as_future": True,
    }
    api = HfApi()
    jobs = [api.upload_folder(folder_path=args.output_dir, ignore_patterns=NOT_UPLOADED, **common)]
    if args.hub_strategy in ("checkpoint", "all_checkpoints"):
        name = "last-checkpoint" if args.hub_strategy == "checkpoint" else Path(checkpoint).name
        jobs.append(api.upload_folder(folder_path=checkpoint, path_in_repo=name, **common))
    if running is None or running.is_done():
        trainer.push_in_progress = PushInProgress(jobs)
    else:
        running.jobs.extend(jobs)
