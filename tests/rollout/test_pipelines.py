# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Every pipeline class that we can build tiny, from its own images to a LoRA that plain diffusers or PEFT loads.

The table of docs/source/pipelines.md is what these tests found: `DIFFDOCTOR_WRITE_DOCS=1 pytest -m "" tests/rollout/test_pipelines.py`
writes it, and without that variable each test compares its row with the one there.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.classic_pipelines import CLASSIC
from fixtures.pipelines import BASIC, Tiny
from fixtures.recent_pipelines import RECENT
from fixtures.trainer import lora_of, rows, scatter, tiny_args, tiny_trainer
from PIL import Image

from diffusers_diffdoctor.rollout import DifferentiableRollout
from diffusers_diffdoctor.rollout.drift import prediction_of
from diffusers_diffdoctor.treatment.adapter import add_lora, loading_call


TINY: dict[str, Tiny] = BASIC | CLASSIC | RECENT
PAGE = Path(__file__).parents[2] / "docs/source/pipelines.md"
WRITE = bool(os.environ.get("DIFFDOCTOR_WRITE_DOCS"))
# What stands for the others in a quick run; the slow tests have them all.
QUICK = {
    "FluxPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "KolorsPipeline",
    "Flux2Pipeline",
    "IFPipeline",
}
# A mixture of experts that routes without gradient in evaluation mode; the refusal is tested below.
REFUSED = {"HiDreamImagePipeline"}
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TINY if name not in REFUSED]
TEXTS, SEEDS = ["one cat", "a big dog"], [3, 1]


def settings(tiny: Tiny) -> dict:
    named = {name: tiny.kwargs[name] for name in ("guidance_scale", "max_sequence_length") if name in tiny.kwargs}
    rest = {name: value for name, value in tiny.kwargs.items() if name not in named}
    return {"num_inference_steps": tiny.steps, "gradient_fraction": 0.5, "pipeline_kwargs": rest, **named}


def drawn_plainly(pipeline, arguments: dict, text: str, seed: int) -> torch.Tensor:
    """The pipeline's own image of one prompt, (1, 3, H, W) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        prompt=text,
        **arguments,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        return_dict=False,
    )[0]
    image = torch.stack(list(image)) if isinstance(image, list) else image
    image = image.squeeze(2) if image.ndim == 5 else image
    if image.min() < 0:  # some leave [-1, 1]
        image = (image / 2 + 0.5).clamp(0, 1)
    return image.float()


def photos(size: int, count: int = 3) -> list[dict]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [{"image": Image.fromarray(pixels[i]), "prompt": f"photo {i}"} for i in range(count)]


def trained(folder: Path, tiny: Tiny, checkpointing: bool, offline: bool):
    """A trainer after one update, its LoRA scattered before so that every weight counts."""
    pipeline = tiny.build()
    trainer = tiny_trainer(
        folder,
        pipeline,
        parts={
            "train_dataset": rows(TEXTS),
            "regularization_dataset": photos(tiny.size) if offline else None,
        },
        **({"max_sequence_length": None} | settings(tiny)),
        resolution=tiny.size,
        lora_target_modules=None,
        gradient_checkpointing=checkpointing,
        vae_gradient_checkpointing=checkpointing,
        pixel_selection="mean",
        max_steps=1,
        optim="sgd",
        learning_rate=1e-2,
    )
    scatter(trainer)
    start = lora_of(trainer)
    trainer.train()
    return trainer, start, lora_of(trainer)


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_is_treated_from_end_to_end(tmp_path, name):
    tiny = TINY[name]
    remarks = []

    # Images are the plain call's, from prompts that were encoded before the text encoders went.
    pipeline = tiny.build()
    rollout = DifferentiableRollout(pipeline, height=tiny.size, width=tiny.size, **settings(tiny))
    expected = torch.cat([drawn_plainly(pipeline, rollout.call_kwargs, t, s) for t, s in zip(TEXTS, SEEDS)])
    rollout.cache_prompts(TEXTS)
    rollout.free_text_encoders()
    remembered = rollout.prompts_not_cached is None
    texts = [name for name in pipeline.components if name.startswith(("text_encoder", "tokenizer"))]
    assert all(getattr(pipeline, name) is None for name in texts) == (remembered or not texts)
    images = rollout.generate(TEXTS, SEEDS)
    assert images.shape == (2, 3, tiny.size, tiny.size)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert (images[0] - images[1]).abs().max() > 1e-3
    if not remembered:
        remarks.append(rollout.prompts_not_cached)

    # Gradient in the window, no graph before it.
    add_lora(pipeline, rollout.denoiser_name, tiny_args(tmp_path, lora_target_modules=None), None)
    weights = [weight for weight in rollout.denoiser.parameters() if weight.requires_grad]
    generator = torch.Generator().manual_seed(1)
    for weight in weights:
        weight.data.normal_(std=0.1, generator=generator)
    graphs = []
    hook = rollout.denoiser.register_forward_hook(
        lambda module, args, result: graphs.append(prediction_of(result).requires_grad)
    )
    output = rollout(TEXTS[:1], SEEDS[:1])
    hook.remove()
    calls = len(graphs) // sum(graphs) if sum(graphs) else 0
    assert graphs == sorted(graphs) and 1 <= calls <= 2 and not graphs[0]
    output.images.square().sum().backward()
    gradients = [weight.grad for weight in weights]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    assert sum(gradient.abs().sum() > 0 for gradient in gradients) >= 0.9 * len(gradients)
    if rollout._shares is False:
        remarks.append("images are drawn one by one: in a batch they depend on their neighbours")

    # One update of the trainer, with and without checkpointing.
    fresh = DifferentiableRollout(tiny.build(), height=tiny.size, width=tiny.size, **settings(tiny))
    missing = fresh.offline_loss_missing
    trainer, start, plain = trained(tmp_path / "plain", tiny, checkpointing=False, offline=missing is None)
    assert all(torch.isfinite(value).all() for value in plain.values())
    assert max((plain[key] - start[key]).abs().max() for key in plain) > 0
    logged = trainer.state.log_history[0]
    assert ("loss/offline" in logged) == (missing is None) and np.isfinite(logged["loss"])
    try:
        _, _, checkpointed = trained(tmp_path / "checkpointed", tiny, checkpointing=True, offline=missing is None)
        for key, value in plain.items():
            torch.testing.assert_close(checkpointed[key], value, rtol=1e-4, atol=1e-6)
    except ValueError as error:
        assert "`gradient_checkpointing` is on" in str(error)
        remarks.append("no gradient checkpointing")

    # The LoRA, out and back in without this package.
    treated = trainer.generate(TEXTS[:1], SEEDS[:1])
    trainer.save_model(tmp_path / "lora")
    pipe = tiny.build()
    call = loading_call(pipe, trainer.rollout.denoiser_name, str(tmp_path / "lora"))
    exec(call, {"pipe": pipe} | ({"PeftModel": __import__("peft").PeftModel} if "PeftModel" in call else {}))
    loaded = drawn_plainly(pipe, trainer.rollout.call_kwargs, TEXTS[0], SEEDS[0])
    torch.testing.assert_close(treated, loaded, rtol=0, atol=1e-4)
    assert (loaded - expected[:1]).abs().max() > 1e-4

    if missing is not None:
        remarks.append(f"no offline loss: {missing}")
    loader = next(each for each in ("load_lora_weights", "load_lora_adapter", "PeftModel") if each in call)
    check_row(name, remembered, missing is None, loader, remarks)


def check_row(name: str, remembered: bool, offline: bool, loader: str, remarks: list[str]) -> None:
    """Write the row of a class into the page, or compare it with the one that is there."""
    loader = f"`{'PEFT' if loader == 'PeftModel' else loader}`"
    remark = "; ".join(remarks).replace(name, "it").replace("|", "\\|")
    row = f"| `{name}` | {'yes' if remembered else 'no'} | {'yes' if offline else 'no'} | {loader} | {remark} |"
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    if WRITE:
        first = next(i for i, line in enumerate(lines) if line.startswith("|---")) + 1
        last = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))
        others = [line for line in lines[first:last] if not line.startswith(f"| `{name}` |")]
        lines[first:last] = sorted([*others, row], key=str.lower)
        PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert row in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_lists_what_is_tested():
    listed = {line.split("`")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")}
    assert {name for name in TINY if name not in REFUSED} <= listed <= {*TINY}


def test_experts_that_are_routed_without_gradient_are_refused():
    tiny = TINY["HiDreamImagePipeline"]
    pipeline = tiny.build()
    rollout = DifferentiableRollout(pipeline, height=tiny.size, width=tiny.size, **settings(tiny))
    pipeline.transformer.requires_grad_(True)
    with pytest.raises(ValueError, match=r"experts.* runs without gradient"):
        rollout(TEXTS[:1], SEEDS[:1])


def test_sizes_that_a_pipeline_does_not_keep_are_refused():
    tiny = TINY["Kandinsky5T2IPipeline"]
    rollout = DifferentiableRollout(tiny.build(), height=tiny.size, width=2 * tiny.size, **settings(tiny))
    with pytest.raises(ValueError, match=rf"asked for images of {tiny.size} x {2 * tiny.size} pixels, but returned"):
        rollout.generate(TEXTS[:1], SEEDS[:1])
