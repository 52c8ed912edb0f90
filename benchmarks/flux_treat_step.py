# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Seconds and memory of one step of treatment on FLUX.1-schnell at its full size, against what the hardware allows.

Speed does not depend on what the weights are: they are random and made on the device, so nothing is downloaded. There are no
text encoders, as in training once prompts are cached; embeddings are random. A step is what the trainer does: a rollout of 4
steps with gradient in the last, the artifact penalty of a SegFormer-b5, the offline loss on one image per prompt, backward,
clipping, AdamW on a LoRA of rank 16.

    python benchmarks/flux_treat_step.py                          # 512 and 1024 px, with and without recomputation
    python benchmarks/flux_treat_step.py --resolutions 512 --batch_size 4 --no_offline
    python benchmarks/flux_treat_step.py --tiny --device cpu      # does it run? Its figures mean nothing

Results go to benchmarks/results/<device>.json.
"""

import argparse
import contextlib
import json
import platform
import re
import statistics
import time
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig

from diffusers_diffdoctor import ArtifactDetectorConfig, ArtifactDetectorForSemanticSegmentation, ArtifactReward
from diffusers_diffdoctor.rollout import DifferentiableRollout
from diffusers_diffdoctor.treatment.losses import offline_loss


# The configurations of the released FLUX.1-schnell.
SCHNELL = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TINY_TRANSFORMER = SCHNELL | {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
}
TINY_VAE = VAE | {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
TINY_DETECTOR = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
    "image_size": 64,
}

# TFLOP (2 x MAC) of one image at a resolution, counted on meta tensors: forward, and forward with backward through the
# frozen base to the LoRA or the image. The detector looks at 512 px whatever the image's size.
TFLOP = {
    512: {"denoiser": (17.7, 36.6), "vae": (2.5, 5.1), "detector": (0.22, 0.46)},
    1024: {"denoiser": (69.6, 152.4), "vae": (10.5, 21.5), "detector": (0.22, 0.46)},
}
TARGET_SECONDS = {512: 0.27, 1024: 1.1}  # batch 1, with offline loss, on an H100
STEPS, TEXT_TOKENS = 4, 256


def build(model_class: type, config: dict, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """A model with random weights, made where it runs: an initialisation of 12 billion weights on the CPU takes minutes."""
    with torch.device("meta"):
        model = model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)
    model = model.to(dtype).to_empty(device=device)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        else:
            torch.nn.init.constant_(weight, 0.0 if name.endswith("bias") else 1.0)
    for name, buffer in model.named_buffers():  # statistics of a batch norm; `to_empty` left them undefined
        buffer.fill_(1 if name.endswith("running_var") else 0)
    return model.eval().requires_grad_(False)


def build_pipeline(device: str, tiny: bool) -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=build(AutoencoderKL, TINY_VAE if tiny else VAE, device, torch.bfloat16),
        transformer=build(FluxTransformer2DModel, TINY_TRANSFORMER if tiny else SCHNELL, device, torch.bfloat16),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )


def model_tflop(resolution: int, batch: int, offline_batch: int) -> float | None:
    """TFLOP that one step needs, recomputation not counted; None where nobody has counted."""
    if resolution not in TFLOP:
        return None
    part = TFLOP[resolution]
    image = (STEPS - 1) * part["denoiser"][0] + sum(part[name][1] for name in ("denoiser", "vae", "detector"))
    # the VAE's encoder costs a little less than its decoder; latents are not cached here
    return batch * image + offline_batch * (part["denoiser"][1] + part["vae"][0])


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure_matmul(device: str, size: int) -> float:
    """TFLOP/s of the best of a few large bfloat16 matrix products: the ceiling of this device in this run."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        synchronize(device)
        seconds.append((time.perf_counter() - start) / 4)
    return 2 * size**3 / min(seconds) / 1e12


def measure_step(pipeline: FluxPipeline, reward: ArtifactReward, resolution: int, checkpointing: bool, args) -> dict:
    """Median seconds of a step and peak memory, for one resolution."""
    device, cuda = args.device, args.device.startswith("cuda")
    rollout = DifferentiableRollout(
        pipeline, height=resolution, width=resolution, num_inference_steps=STEPS, gradient_fraction=1 / STEPS
    )
    (
        rollout.denoiser.enable_gradient_checkpointing
        if checkpointing
        else rollout.denoiser.disable_gradient_checkpointing
    )()
    rollout.vae_gradient_checkpointing = not args.no_vae_checkpointing
    prompts = [f"prompt {i}" for i in range(args.batch_size)]
    for prompt in prompts:
        embeddings = (torch.randn(1, TEXT_TOKENS, 4096), torch.randn(1, 768), torch.zeros(TEXT_TOKENS, 3))
        rollout.cache_embeddings(prompt, tuple(value.bfloat16() for value in embeddings))
    weights = [weight for weight in rollout.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    offline = {}
    if not args.no_offline:
        offline = {
            "regularization_images": torch.rand(args.batch_size, 3, resolution, resolution, device=device),
            "regularization_prompts": prompts,
            "regularization_seeds": list(range(args.batch_size)),
        }
    autocast = torch.autocast(device.split(":")[0], torch.bfloat16) if args.autocast else contextlib.nullcontext()

    def step(seed: int) -> torch.Tensor:
        with autocast:
            output = rollout(prompts, list(range(seed, seed + args.batch_size)), **offline)
            loss = reward(output.images, prompts).loss.mean()
            if offline:
                loss = loss + 0.25 * offline_loss(output.prediction, output.target).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    seconds = []
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for i in range(args.warmup + args.steps):
        synchronize(device)
        start = time.perf_counter()
        loss = step(1000 * i)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"The loss is {loss.item()}: such a step may be faster than a real one.")
    return {
        "seconds_per_step": statistics.median(seconds[args.warmup :]),
        "seconds_fastest": min(seconds[args.warmup :]),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", help="pixels of a side (default: 512 1024)")
    parser.add_argument("--batch_size", type=int, default=1, help="images per step, and as many of the offline loss")
    parser.add_argument("--steps", type=int, default=10, help="timed steps; the median counts")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--no_offline", action="store_true", help="pixel loss only")
    parser.add_argument("--no_vae_checkpointing", action="store_true", help="keep the activations of the VAE")
    parser.add_argument(
        "--autocast", action="store_true", help="under bfloat16 autocast, as `bf16=True` of the trainer"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models at 64 px, to see that it runs")
    parser.add_argument("--output", type=Path, help="file for the results (default: benchmarks/results/<device>.json)")
    args = parser.parse_args(argv)
    resolutions = args.resolutions or ([64] if args.tiny else [512, 1024])

    torch.manual_seed(0)
    pipeline = build_pipeline(args.device, args.tiny)
    pipeline.transformer.add_adapter(
        LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    for weight in pipeline.transformer.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    config = ArtifactDetectorConfig(**(TINY_DETECTOR if args.tiny else {}))
    detector = build(ArtifactDetectorForSemanticSegmentation, config, args.device, torch.bfloat16)
    reward = ArtifactReward(detector, threshold=0.0)  # random confidences: count every pixel

    ceiling = measure_matmul(args.device, 256 if args.tiny else 8192)
    rows = []
    for resolution in resolutions:
        tflop = (
            None if args.tiny else model_tflop(resolution, args.batch_size, 0 if args.no_offline else args.batch_size)
        )
        for checkpointing in (True, False):
            row = {"resolution": resolution, "denoiser_checkpointing": checkpointing, "model_tflop": tflop}
            try:
                row |= measure_step(pipeline, reward, resolution, checkpointing, args)
            except torch.OutOfMemoryError:
                row["out_of_memory"] = True
                rows.append(row)
                continue
            if tflop is not None:
                row["tflop_per_second"] = tflop / row["seconds_per_step"]
                row["share_of_matmul"] = row["tflop_per_second"] / ceiling
                row["target_seconds"] = (
                    TARGET_SECONDS[resolution] if args.batch_size == 1 and not args.no_offline else None
                )
            rows.append(row)
            print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})

    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()} cpu"
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "resolutions")}
    result = {
        "device": name,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "matmul_tflop_per_second": ceiling,
        "settings": settings,
        "rows": rows,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ("-tiny" if args.tiny else "")
    path = args.output or Path(__file__).parent / "results" / f"{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"Measured {ceiling:.0f} TFLOP/s of bfloat16 matrix products; wrote {path}.")
    return result


if __name__ == "__main__":
    main()
