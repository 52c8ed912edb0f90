# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Rebuild every part of the miniature from scratch, on a CPU.

    diffdoctor miniature build --output DIR [--parts pipeline detector judge clip]

The order matters only for the VAE: detector, judge and CLIP see a third of their scenes as the VAE reproduces them, because
that is how the pipeline draws. The parts see different scenes: each stage renders from seeds of its own. The text encoders
stay random: the grammar has 432 captions, and a random transformer keeps them apart.
"""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ..detector import (
    ArtifactDetectorConfig,
    ArtifactDetectorForSemanticSegmentation,
    ArtifactDetectorImageProcessor,
    ArtifactDetectorTrainer,
    ArtifactDetectorTrainingArguments,
)
from ..detector.losses import cross_entropy_with_dice
from .check import fresh_scenes, rates_on_scenes, reproduce
from .judge import MiniatureJudge
from .muon import Muon
from .renderer import IMAGE_SIZE, WRONG_SHARE, all_prompts, render, sample_scene


PARTS = ("pipeline", "detector", "judge", "clip")
MAX_TOKENS = 12  # the longest caption with its end token
# The stages' scenes never meet: each starts from a seed of its own.
SEEDS = {"vae": 1, "transformer": 2, "detector": 3, "judge": 4, "clip": 5}


# --- scenes ----------------------------------------------------------------------------------------------------------


def _render_chunk(seed: int, count: int, wrong_share: float, under_treatment: bool):
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, wrong_share, under_treatment) for _ in range(count)]
    images, maps = zip(*(render(scene) for scene in scenes))
    return np.stack(images), np.stack(maps), [scene.caption for scene in scenes]


def render_scenes(
    count: int,
    seed: int,
    wrong_share: float,
    under_treatment: bool = False,
    chunk: int = 500,
    workers: int | None = None,
):
    """`count` scenes as images uint8 (N, 3, 64, 64), maps uint8 (N, 1, 64, 64) and captions, the same for any `workers`."""
    sizes = [min(chunk, count - start) for start in range(0, count, chunk)]
    with ProcessPoolExecutor(workers) as pool:
        job = partial(_render_chunk, wrong_share=wrong_share, under_treatment=under_treatment)
        chunks = list(pool.map(job, [seed * 1_000_003 + i for i in range(len(sizes))], sizes))
    images = torch.from_numpy(np.concatenate([c[0] for c in chunks])).permute(0, 3, 1, 2).contiguous()
    maps = torch.from_numpy(np.concatenate([c[1] for c in chunks]))[:, None]
    return images, maps, [caption for c in chunks for caption in c[2]]


def labelled_scenes(
    count: int, seed: int, vae: AutoencoderKL, wrong_share: float = 0.6, under_treatment: bool = False
):
    """Scenes with maps, every third one passed through the VAE."""
    images, maps, captions = render_scenes(count, seed, wrong_share, under_treatment)
    images[::3] = reproduce(vae, images[::3], noise=0.15)
    return images, maps, captions


def _train(
    module: torch.nn.Module,
    loss_of_step: Callable[[int, torch.Generator], torch.Tensor],
    steps: int,
    lr: float,
    desc: str,
    state_file: Path,
    ema_decay: float | None = None,
) -> None:
    """Train `module` with [`Muon`] at a learning rate that falls to zero in the last third; stopped, it goes on where it was.

    Args:
        module: trained in place; ends in eval mode.
        loss_of_step: from the step and a generator seeded with it to the loss of one batch.
        steps: of the optimizer.
        lr: learning rate between warm-up and decay.
        desc: title of the progress bar.
        state_file: keeps the state every 250 steps; removed at the end.
        ema_decay: end with the exponential moving average of the weights.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = Muon(module, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 100, max(0.0, steps - i) / (steps / 3))
    )
    average = None
    if ema_decay is not None:
        ema = torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
        average = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=ema)
    stateful = {"module": module, "optimizer": optimizer, "schedule": schedule} | (
        {"average": average} if average else {}
    )
    start = 0
    if state_file.exists():
        saved = torch.load(state_file)
        start = saved.pop("step")
        for name, state in saved.items():
            stateful[name].load_state_dict(state)
    module.train()
    bar = tqdm(range(start, steps), desc=desc, initial=start, total=steps, mininterval=10)
    loss_average = None
    for step in bar:
        loss = loss_of_step(step, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update_parameters(module)
        loss_average = loss.item() if loss_average is None else 0.98 * loss_average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{loss_average:.4f}", refresh=False)
        if (step + 1) % 250 == 0:
            state_file.parent.mkdir(parents=True, exist_ok=True)
            part = state_file.with_suffix(".part")
            torch.save({name: o.state_dict() for name, o in stateful.items()} | {"step": step + 1}, part)
            part.replace(state_file)
    if average is not None:
        module.load_state_dict(average.module.state_dict())
    module.eval()
    state_file.unlink(missing_ok=True)


# --- pipeline --------------------------------------------------------------------------------------------------------


def build_vae(output_dir: Path, steps: int = 1500, decoder_steps: int = 3000, scenes: int = 16_000) -> AutoencoderKL:
    """64x64 pixels to 16x16 latents of 8 channels; first both halves learn, then the decoder alone."""
    torch.manual_seed(SEEDS["vae"])
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 64],
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    images, _, _ = render_scenes(scenes, SEEDS["vae"], wrong_share=0.6)

    def loss_of_step(step, generator):
        x = images[torch.randint(scenes, (16,), generator=generator)].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator)).sample
        # edges weigh as much as areas: the parts of these scenes are thin
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        return (y - x).abs().mean() + F.mse_loss(y, x) + edges + 1e-4 * posterior.kl().mean() / x[0].numel() * 48

    state = output_dir / "training"
    if not (state / "vae-decoder.pt").exists():
        _train(vae, loss_of_step, steps, 2e-3, "vae", state / "vae.pt")
    vae.encoder.requires_grad_(False)  # the latents are settled, their picture can still get sharper
    _train(vae, loss_of_step, decoder_steps, 2e-3, "vae decoder", state / "vae-decoder.pt")
    with torch.no_grad():
        latents = torch.cat([vae.encode(b.float() / 127.5 - 1).latent_dist.mode() for b in images[:2000].split(250)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return vae


def _corpus() -> list[str]:
    return [row["prompt"] for row in all_prompts()]


def _clip_tokenizer() -> CLIPTokenizer:
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(
        _corpus(), trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>", show_progress=False)
    )
    learned = json.loads(bpe.to_str())["model"]
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz0123456789.,-" for end in ("", "</w>")]
    tokens = dict.fromkeys(
        ["<|startoftext|>", "<|endoftext|>", *letters, *sorted(learned["vocab"], key=learned["vocab"].get)]
    )
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in learned["merges"]],
        model_max_length=16,
    )


def _t5_tokenizer() -> T5Tokenizer:
    words = sorted({word for prompt in _corpus() for word in prompt.split()})
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789.,-")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -3.0) for w in words), ("▁", -6.0)]
    pieces += [(c, -8.0) for c in letters if f"▁{c}" != c]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)


def _clip_text_config(tokenizer: CLIPTokenizer, layers: int = 2) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "projection_dim": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def new_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """The pipeline with an untrained transformer of 2.2 M parameters."""
    torch.manual_seed(SEEDS["transformer"])
    tokenizer, tokenizer_2 = _clip_tokenizer(), _t5_tokenizer()
    text_encoder = CLIPTextModel(CLIPTextConfig(**_clip_text_config(tokenizer))).eval()
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=1,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=False,
    )
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=1.5),
        vae,
        text_encoder,
        tokenizer,
        text_encoder_2,
        tokenizer_2,
        transformer,
    )


def build_transformer(
    pipeline: FluxPipeline, output_dir: Path, steps: int = 10_000, scenes: int = 40_000, batch_size: int = 48
) -> None:
    """Train the transformer by flow matching (arXiv 2210.02747), `WRONG_SHARE` of the prone scenes wrong; keep its average."""
    images, _, captions = render_scenes(scenes, SEEDS["transformer"], WRONG_SHARE)
    vae, transformer = pipeline.vae, pipeline.transformer
    with torch.no_grad():
        shift, scale = vae.config.shift_factor, vae.config.scaling_factor
        latents = torch.cat(
            [
                (vae.encode(b.float() / 127.5 - 1).latent_dist.mode() - shift) * scale
                for b in tqdm(images.split(25), desc="encode", mininterval=10)
            ]
        )
        n, c, h, w = latents.shape
        latents = FluxPipeline._pack_latents(latents, n, c, h, w)
        prompts = sorted(set(captions))
        embeds, pooled, text_ids = pipeline.encode_prompt(prompts, prompts, max_sequence_length=MAX_TOKENS)
    of_caption = torch.tensor([{p: i for i, p in enumerate(prompts)}[caption] for caption in captions])
    image_ids = FluxPipeline._prepare_latent_image_ids(1, h // 2, w // 2, latents.device, latents.dtype)
    shift = pipeline.scheduler.config.shift

    def loss_of_step(step, generator):
        rows = torch.randint(scenes, (batch_size,), generator=generator)
        x, noise = latents[rows], torch.randn(batch_size, *latents.shape[1:], generator=generator)
        sigma = torch.sigmoid(torch.randn(batch_size, generator=generator) * 1.2)
        sigma = (shift * sigma / (1 + (shift - 1) * sigma))[:, None, None]
        prediction = transformer(
            hidden_states=(1 - sigma) * x + sigma * noise,
            timestep=sigma[:, 0, 0],
            encoder_hidden_states=embeds[of_caption[rows]],
            pooled_projections=pooled[of_caption[rows]],
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return F.mse_loss(prediction, noise - x)

    state_file = output_dir / "training" / "transformer.pt"
    _train(transformer, loss_of_step, steps, 1e-3, "transformer", state_file, ema_decay=0.998)


# --- detector, judge, CLIP -------------------------------------------------------------------------------------------


class _TensorScenes(torch.utils.data.Dataset):
    """Scenes as the detector's input, prepared on access."""

    def __init__(self, images: torch.Tensor, maps: torch.Tensor, config: ArtifactDetectorConfig):
        self.images, self.maps, self.config = images, maps, config
        self.mean = torch.tensor(config.image_mean)[:, None, None]
        self.std = torch.tensor(config.image_std)[:, None, None]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        size = (self.config.image_size,) * 2
        image = F.interpolate(self.images[i : i + 1].float() / 255, size=size, mode="bilinear", antialias=True)[0]
        return {"pixel_values": (image - self.mean) / self.std, "labels": self.maps[i].float() / 255}


def new_detector() -> ArtifactDetectorForSemanticSegmentation:
    """A SegFormer for scenes, with logits of half their size and random weights."""
    config = ArtifactDetectorConfig(
        image_size=64,
        strides=[2, 2, 2, 2],  # logits at 32x32, half the size of the scene
        patch_sizes=[7, 3, 3, 3],
        depths=[2, 2, 2, 2],
        hidden_sizes=[32, 64, 96, 128],
        num_attention_heads=[1, 2, 3, 4],
        mlp_ratios=[4, 4, 4, 4],
        decoder_hidden_size=64,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )
    model = ArtifactDetectorForSemanticSegmentation(config)
    # SegFormer's initialization is for widths of hundreds; at these, signals would die out in the convolutions.
    model.apply(lambda m: m.reset_parameters() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) else None)
    return model


def build_detector(vae: AutoencoderKL, output_dir: Path, steps: int = 5000, scenes: int = 20_000) -> None:
    """[`new_detector`], trained by [`ArtifactDetectorTrainer`]."""
    torch.manual_seed(SEEDS["detector"])
    model = new_detector()
    config = model.config
    images, maps, _ = labelled_scenes(scenes, SEEDS["detector"], vae, under_treatment=True)
    held = min(500, scenes // 4)
    args = ArtifactDetectorTrainingArguments(
        output_dir=str(output_dir / "training" / "detector"),
        max_steps=steps,
        per_device_train_batch_size=24,
        per_device_eval_batch_size=100,
        loss="bce_dice",  # it starts from random weights, the paper's from pretrained ones
        learning_rate=1e-3,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 3, "warmup_type": "linear", "decay_type": "linear"},
        warmup_steps=100,
        logging_steps=100,
        eval_strategy="steps",
        eval_steps=500,
        save_steps=500,
        save_total_limit=1,
        report_to="none",
        seed=SEEDS["detector"],
        use_cpu=True,
    )
    trainer = ArtifactDetectorTrainer(
        model,
        args,
        train_dataset=_TensorScenes(images[held:], maps[held:], config),
        eval_dataset=_TensorScenes(images[:held], maps[:held], config),
        optimizers=(Muon(model, args.learning_rate), None),
    )
    trainer.train(resume_from_checkpoint="auto")
    shutil.rmtree(args.output_dir, ignore_errors=True)
    model.eval().half().save_pretrained(output_dir / "detector")
    ArtifactDetectorImageProcessor.for_detector(config).save_pretrained(output_dir / "detector")
    _forget_code(output_dir / "detector")


def _forget_code(folder: Path) -> None:
    """A detector for the Hub carries a copy of its code; one that lies inside the package would only keep an old one."""
    for path in folder.glob("*.py"):
        path.unlink()
    for name in ("config.json", "preprocessor_config.json"):
        config = json.loads((folder / name).read_text())
        config.pop("auto_map", None)
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")


def build_judge(vae: AutoencoderKL, output_dir: Path, steps: int = 4000, scenes: int = 24_000) -> None:
    """The U-Net judge, and its error rates on fresh scenes as the VAE reproduces them."""
    torch.manual_seed(SEEDS["judge"])
    judge = MiniatureJudge().to(memory_format=torch.channels_last)
    images, maps, _ = labelled_scenes(scenes, SEEDS["judge"], vae, under_treatment=True)

    def loss_of_step(step, generator):
        rows = torch.randint(scenes, (32,), generator=generator)
        x, target = images[rows].float() / 255, maps[rows].float() / 255
        gain = 1 + 0.1 * torch.randn(len(rows), 1, 1, 1, generator=generator)
        x = (x * gain).clamp(0, 1).contiguous(memory_format=torch.channels_last)
        logits = judge(x)
        return cross_entropy_with_dice(logits, target).mean()

    _train(judge, loss_of_step, steps, 2e-3, "judge", output_dir / "training" / "judge.pt")
    judge = judge.to(memory_format=torch.contiguous_format)
    judge.half().save_pretrained(output_dir / "judge")
    fresh, _, reproduced = fresh_scenes(vae)
    rates = rates_on_scenes(judge.float().confidence, fresh, reproduced)
    # `check` also measures them on samples of the pipeline, once somebody has labelled those by eye
    (output_dir / "judge" / "error_rates.json").write_text(json.dumps({"on_scenes": rates}, indent=2) + "\n")


def build_clip(vae: AutoencoderKL, output_dir: Path, steps: int = 1000, scenes: int = 9_000) -> None:
    """A CLIP of scenes and captions (arXiv 2103.00020); images of one caption are not pushed apart."""
    torch.manual_seed(SEEDS["clip"])
    tokenizer = _clip_tokenizer()
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "projection_dim": 64,
    }
    model = CLIPModel(CLIPConfig(text_config=_clip_text_config(tokenizer), vision_config=vision, projection_dim=64))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    images, _, captions = labelled_scenes(scenes, SEEDS["clip"], vae)
    prompts = sorted(set(captions))
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    of_caption = torch.tensor([{p: i for i, p in enumerate(prompts)}[caption] for caption in captions])
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))

    def loss_of_step(step, generator):
        rows = torch.randint(scenes, (96,), generator=generator)
        texts, labels = of_caption[rows].unique(return_inverse=True)
        output = model(
            input_ids=tokens["input_ids"][texts],
            attention_mask=tokens["attention_mask"][texts],
            pixel_values=(images[rows].float() / 255 - mean) / std,
        )
        same = F.one_hot(labels, len(texts)).float()
        per_text = (output.logits_per_text.log_softmax(-1) * (same.T / same.T.sum(-1, keepdim=True))).sum(-1)
        return (F.cross_entropy(output.logits_per_image, labels) - per_text.mean()) / 2

    _train(model, loss_of_step, steps, 1.5e-3, "clip", output_dir / "training" / "clip.pt")
    model.half().save_pretrained(output_dir / "clip")
    tokenizer.save_pretrained(output_dir / "clip")
    processor.save_pretrained(output_dir / "clip")


# --- all -------------------------------------------------------------------------------------------------------------


def build(parts: tuple[str, ...] = PARTS, output_dir: str | Path = "miniature", quick: bool = False) -> Path:
    """Build parts of the miniature into `output_dir`. Parts that need the VAE take the one that lies there, or build it.

    Args:
        parts: some of `PARTS`.
        output_dir: a folder; each part becomes a folder in it.
        quick: a few steps of everything on few scenes, to see that it runs. The parts are useless.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown or not parts:
        raise ValueError(f"`parts` holds {unknown or 'nothing'}; choose from {list(PARTS)}.")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    budget = {"steps": 3, "scenes": 1200} if quick else {}
    folder = output_dir / "pipeline" / "vae"
    if folder.exists():
        vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()
    else:
        vae = build_vae(output_dir, **(budget | {"decoder_steps": 3} if quick else {}))
        vae.half().save_pretrained(folder)
        vae.float()
    if "pipeline" in parts:
        pipeline = new_pipeline(vae)
        build_transformer(pipeline, output_dir, **budget)
        pipeline.to(torch.float16).save_pretrained(output_dir / "pipeline")
        for path in (output_dir / "pipeline").rglob("*.json"):
            content = json.loads(path.read_text())
            path_here = content.pop("_name_or_path", None)  # of this machine
            # Without a type asked for, transformers' parts take the one of their configuration and diffusers' float32: they
            # must be equal.
            half = "dtype" in content
            if half:
                content["dtype"] = "float32"
            if half or path_here is not None:
                path.write_text(json.dumps(content, indent=2) + "\n")
        vae.float()
    if "detector" in parts:
        build_detector(vae, output_dir, **budget)
    if "judge" in parts:
        build_judge(vae, output_dir, **budget)
    if "clip" in parts:
        build_clip(vae, output_dir, **budget)
    return output_dir
