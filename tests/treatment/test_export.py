# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""A LoRA in the layouts of other programs, read back by diffusers' own loader."""

import json

import pytest
import torch
from fixtures.classic_pipelines import CLASSIC
from fixtures.pipelines import BASIC, LORA_TARGETS
from fixtures.trainer import tiny_args
from peft import LoraConfig
from safetensors.torch import load_file

from diffdoctor import main
from diffusers_diffdoctor.treatment.adapter import add_lora, save_lora
from diffusers_diffdoctor.treatment.export import LAYOUTS, export_lora


TINY = BASIC | CLASSIC
NAMES = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"]
ALPHA = {"r": 2, "lora_alpha": 6}
PATTERNS = {"r": 2, "lora_alpha": 6, "rank_pattern": {"to_q": 4}, "alpha_pattern": {"to_k": 3}, "use_rslora": True}


@torch.no_grad()
def draw(pipeline, tiny) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": tiny.size, "width": tiny.size, "num_inference_steps": tiny.steps}
    seed = torch.Generator().manual_seed(0)
    return pipeline(prompt="a cup", **size, generator=seed, output_type="pt", **tiny.kwargs).images


def treated(name, folder, targets=LORA_TARGETS, **settings):
    """What a treatment leaves behind, and the pipeline with its adapter."""
    pipeline = TINY[name].build()
    component = "transformer" if hasattr(pipeline, "transformer") else "unet"
    add_lora(pipeline, component, tiny_args(folder), LoraConfig(target_modules=targets, **settings))
    generator = torch.Generator().manual_seed(1)
    for weight in (w for w in getattr(pipeline, component).parameters() if w.requires_grad):
        weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    save_lora(pipeline, component, folder)
    record = {"base": {"pipeline_class": name, "denoiser": component}}
    (folder / "treatment.json").write_text(json.dumps(record), encoding="utf-8")
    return pipeline


@pytest.mark.parametrize("settings", [ALPHA, PATTERNS], ids=["alpha", "patterns"])
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", NAMES)
def test_diffusers_draws_the_same_from_every_layout(tmp_path, name, layout, settings):
    tiny = TINY[name]
    base = draw(tiny.build(), tiny)
    expected = draw(treated(name, tmp_path, **settings), tiny)
    file = export_lora(tmp_path, layout)
    plain = tiny.build()
    plain.load_lora_weights(tmp_path, weight_name=file.name)
    effect = (expected - base).abs().mean()
    assert effect > 5e-4
    assert (draw(plain, tiny) - expected).abs().mean() < 1e-3 * effect


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_has_a_name_and_an_alpha_that_comfyui_knows(tmp_path, name):
    """comfy/lora.py, `model_lora_keys_unet`: for each weight of the model in the names of diffusers, dots become underscores
    after lora_unet_, and after lora_transformer_ for FLUX; `.alpha` over the rank scales a layer, and without it 1."""
    pipeline = treated(name, tmp_path, **ALPHA)
    component, prefix = ("transformer", "lora_transformer_") if name.startswith("Flux") else ("unet", "lora_unet_")
    state = load_file(export_lora(tmp_path))
    plain = getattr(TINY[name].build(), component)
    known = {
        prefix + key.removesuffix(".weight").replace(".", "_") for key in plain.state_dict() if key.endswith(".weight")
    }
    stems = {key.partition(".")[0] for key in state}
    adapted = [module for module in getattr(pipeline, component).modules() if hasattr(module, "lora_A")]
    assert stems <= known and len(stems) == len(adapted)
    for stem in stems:
        assert state[f"{stem}.alpha"].item() == 6 and state[f"{stem}.lora_down.weight"].shape[0] == 2


def test_a_program_that_ignores_alpha_reads_the_same_from_the_diffusers_layout(tmp_path):
    treated("FluxPipeline", tmp_path, **ALPHA)
    saved, state = (
        load_file(tmp_path / "pytorch_lora_weights.safetensors"),
        load_file(export_lora(tmp_path, "diffusers")),
    )
    assert saved.keys() == state.keys()
    for key in (key for key in saved if "lora_A" in key):
        up = key.replace("lora_A", "lora_B")
        assert torch.allclose(state[up] @ state[key], 3 * saved[up] @ saved[key], atol=1e-6)


def test_names_that_diffusers_does_not_read_are_refused(tmp_path):
    """Of FLUX's feed-forward layers diffusers 0.42.1 loses the names, and of SD3 it knows no such layout."""
    treated("FluxPipeline", tmp_path, targets=["to_q", "proj_mlp"], **ALPHA)
    with pytest.raises(ValueError, match=r"`layout` is 'kohya', but the FluxPipeline .* Try 'diffusers'"):
        export_lora(tmp_path)
    export_lora(tmp_path, "diffusers")
    treated("StableDiffusion3Pipeline", tmp_path, **ALPHA)
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline"):
        export_lora(tmp_path)


def test_what_the_layouts_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no pytorch_lora_weights\.safetensors"):
        export_lora(tmp_path)
    treated("FluxPipeline", tmp_path, use_dora=True, **ALPHA)
    with pytest.raises(ValueError, match="more than A and B"):
        export_lora(tmp_path)
    with pytest.raises(ValueError, match="`layout` is 'comfy'"):
        export_lora(tmp_path, "comfy")


def test_the_command_writes_a_file_beside_the_lora_that_does_not_stand_in_its_way(tmp_path, capsys):
    tiny = TINY["StableDiffusionXLPipeline"]
    expected = draw(treated("StableDiffusionXLPipeline", tmp_path, **ALPHA), tiny)
    assert main(["export-lora", str(tmp_path)]) == 0
    assert str(tmp_path / "lora_kohya.safetensors") in capsys.readouterr().out
    plain = tiny.build()
    plain.load_lora_weights(tmp_path)
    assert torch.equal(draw(plain, tiny), expected)
    assert main(["export-lora", str(tmp_path / "nowhere")]) == 1
    assert "has no pytorch_lora_weights" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export-lora", "--help"])
    assert f"{{{','.join(LAYOUTS)}}}" in capsys.readouterr().out
