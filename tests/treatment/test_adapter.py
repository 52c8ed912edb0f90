# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The adapter: which layers get one, what of it is refused, and that others load what was saved."""

import inspect

import pytest
import torch
from diffusers import FluxTransformer2DModel, PRXTransformer2DModel
from fixtures.classic_pipelines import CLASSIC
from fixtures.pipelines import BASIC, LORA_TARGETS, tiny_flux, tiny_pixart
from fixtures.recent_pipelines import RECENT
from fixtures.trainer import tiny_args, tiny_trainer
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_diffdoctor.treatment.adapter import (
    add_lora,
    attention_projections,
    load_lora,
    loading_lines,
    lora_files,
    merge_lora,
    save_lora,
)


TINY = BASIC | CLASSIC | RECENT
FORMS = ["FluxPipeline", "BriaPipeline", "PixArtAlphaPipeline"]  # one for each way to load
# further classes that take one of these ways by another road
ODD = ["Kandinsky3Pipeline", "KandinskyV22CombinedPipeline"]
# On processors without AVX-512, results depend in their last bits on where weights lie in memory, and those of a file lie elsewhere.
ROUNDING, CHAOS = (
    1e-5,
    1e-3,
)  # the tiny Kandinsky 3 makes a thousandfold of such a difference, its LoRA ten thousand times as much


def denoiser_name(pipeline) -> str:
    return "transformer" if getattr(pipeline, "transformer", None) is not None else "unet"


def adapted(pipeline) -> list[str]:
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    return [name for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)]


def with_lora(pipeline, tmp_path, peft_config=None, **changes):
    """An adapter whose B is not zero, on the pipeline."""
    name = denoiser_name(pipeline)
    config = add_lora(pipeline, name, tiny_args(tmp_path, **changes), peft_config)
    generator = torch.Generator().manual_seed(1)
    for weight in (w for w in getattr(pipeline, name).parameters() if w.requires_grad):
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return config


@torch.no_grad()
def draw(pipeline, tiny) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    accepted = inspect.signature(type(pipeline).__call__).parameters
    binning = {"use_resolution_binning": False} if "use_resolution_binning" in accepted else {}
    return pipeline(
        prompt="a cup",
        height=tiny.size,
        width=tiny.size,
        num_inference_steps=tiny.steps,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **(binning | tiny.kwargs),
    ).images


# --- which layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["FluxPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "SanaPipeline"]
)
def test_the_attention_of_most_models_is_the_release_s_list(name):
    pipeline = TINY[name].build()
    assert sorted(attention_projections(getattr(pipeline, denoiser_name(pipeline)))) == sorted(LORA_TARGETS)


def test_projections_of_other_names_are_found_and_their_namesakes_left_out(tmp_path):
    """Kandinsky 5 has `out_layer` in attention, feed-forward, modulation and time embedding alike."""
    pipeline = TINY["Kandinsky5T2IPipeline"].build()
    with_lora(pipeline, tmp_path)
    layers = adapted(pipeline)
    assert layers and all("attention" in name for name in layers)
    assert {name.rpartition(".")[2] for name in layers} == {"to_query", "to_key", "to_value", "out_layer"}
    attentions = {name.rpartition(".")[0] for name in layers}
    assert len(layers) == 4 * len(attentions)


def test_a_fused_projection_and_an_output_without_dropout_are_found(tmp_path):
    """Flux.2's single blocks have `to_qkv_mlp_proj` and a plain `to_out`, its double blocks a list called `to_out`."""
    pipeline = TINY["Flux2Pipeline"].build()
    with_lora(pipeline, tmp_path)
    single = {name.rpartition(".")[2] for name in adapted(pipeline) if name.startswith("single")}
    assert single == {"to_qkv_mlp_proj", "to_out"}
    double = {name.partition("attn.")[2] for name in adapted(pipeline) if not name.startswith("single")}
    assert double == {"to_q", "to_k", "to_v", "to_out.0"}


def test_the_image_s_fused_projection_is_found_and_the_text_s_is_not():
    model = PRXTransformer2DModel(
        in_channels=4, context_in_dim=8, hidden_size=16, num_heads=2, depth=1, axes_dim=[4, 4], patch_size=1
    )
    assert sorted(attention_projections(model)) == ["img_qkv_proj", "to_out.0"]


def test_the_pooling_of_the_text_is_no_attention_of_the_image():
    """HunyuanDiT's pooler hands the weight of its `q_proj` to a function, past any adapter."""
    pipeline = TINY["HunyuanDiTPipeline"].build()
    names = [name for name, module in pipeline.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert any(name.endswith("q_proj") for name in names)
    assert sorted(attention_projections(pipeline.transformer)) == sorted(LORA_TARGETS)


def test_an_explicit_list_wins(tmp_path):
    pipeline = tiny_flux()
    config = with_lora(pipeline, tmp_path, lora_target_modules=["add_q_proj"])
    assert set(config.target_modules) == {"add_q_proj"} and all("add_q_proj" in name for name in adapted(pipeline))


def test_a_peft_config_without_targets_gets_the_attention(tmp_path):
    given = LoraConfig(r=3, lora_alpha=6)
    config = with_lora(tiny_flux(), tmp_path, given)
    assert config.target_modules == set(LORA_TARGETS) and config.r == 3 and given.target_modules is None


@pytest.mark.parametrize("how", ["args", "peft_config"])
def test_a_name_that_no_layer_has_is_refused_with_those_there_are(tmp_path, how):
    names = ["to_q", "to_query"]
    args = tiny_args(tmp_path, **({"lora_target_modules": names} if how == "args" else {}))
    config = LoraConfig(target_modules=names) if how == "peft_config" else None
    argument = "lora_target_modules" if how == "args" else r"peft_config\.target_modules"
    with pytest.raises(ValueError, match=rf"`{argument}` has \['to_query'\], but .*'to_q', 'to_k', 'to_v'"):
        add_lora(tiny_flux(), "transformer", args, config)


# --- untreated is the base -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, cause",
    [
        ({"init_lora_weights": "pissa"}, "changes weights of the base"),
        ({"init_lora_weights": "olora"}, "changes weights of the base"),
        ({"bias": "lora_only"}, "trains weights of the base"),
        ({"bias": "all"}, "trains weights of the base"),
        ({"modules_to_save": ["proj_out"]}, "trains whole modules"),
    ],
    ids=lambda value: str(next(iter(value.values()))) if isinstance(value, dict) else "",
)
def test_an_adapter_without_which_the_base_is_not_the_base_is_refused(tmp_path, changes, cause):
    config = LoraConfig(r=2, lora_alpha=2, target_modules=LORA_TARGETS, **changes)
    with pytest.raises(ValueError, match=f"`peft_config` .*({cause})"):
        add_lora(tiny_flux(), "transformer", tiny_args(tmp_path), config)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 8},
        {"use_rslora": True},
        {"rank_pattern": {"to_q": 4}, "alpha_pattern": {"to_k": 6}},
        {"use_dora": True},
        {"lora_bias": True},
        {"lora_dropout": 0.5},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
    ],
    ids=lambda changes: next(iter(changes)) + str(next(iter(changes.values()))),
)
@pytest.mark.parametrize("name", FORMS)
def test_other_adapters_draw_the_same_in_the_plain_pipeline(tmp_path, name, changes):
    tiny = TINY[name]
    pipeline = tiny.build()
    base, weights = draw(pipeline, tiny), list(pipeline.transformer.parameters())
    values = [weight.clone() for weight in weights]
    with_lora(pipeline, tmp_path, LoraConfig(r=2, target_modules=LORA_TARGETS, **changes))
    assert all(map(torch.equal, weights, values))
    pipeline.transformer.eval()
    save_lora(pipeline, "transformer", tmp_path / "lora")
    plain = load_as_printed(tiny, pipeline, tmp_path)
    treated = draw(pipeline, tiny)
    assert torch.allclose(draw(plain, tiny), treated, atol=ROUNDING)
    assert (treated - base).abs().mean() > 1e-4


def test_a_pipeline_with_an_adapter_is_refused(tmp_path):
    for build in (tiny_flux, tiny_pixart):
        pipeline = build()
        config = LoraConfig(r=2, target_modules=LORA_TARGETS)
        inject_adapter_in_model(config, pipeline.transformer)
        with pytest.raises(ValueError, match="`pipeline` already has the adapters"):
            add_lora(pipeline, "transformer", tiny_args(tmp_path))


# --- out and back --------------------------------------------------------------------------------------------------------


def load_as_printed(tiny, treated, tmp_path, **kwargs):
    """Run the printed lines, and nothing else, on the saved base."""
    name = denoiser_name(treated)
    tiny.build().save_pretrained(tmp_path / "base")
    lines = loading_lines(treated, name, base=tmp_path / "base", lora=tmp_path / "lora", dtype=torch.float32, **kwargs)
    assert "diffdoctor" not in lines.replace(str(tmp_path), "")
    scope = {}
    exec(lines, scope)
    return scope["pipe"]


@pytest.mark.parametrize("name", FORMS + ODD)
def test_the_printed_lines_draw_what_the_treated_pipeline_draws(tmp_path, name):
    tiny = TINY[name]
    pipeline = tiny.build()
    base = draw(pipeline, tiny)
    with_lora(pipeline, tmp_path, lora_rank=2, lora_alpha=6)
    treated = draw(pipeline, tiny)
    save_lora(pipeline, denoiser_name(pipeline), tmp_path / "lora")
    plain = load_as_printed(tiny, pipeline, tmp_path)
    assert type(plain) is type(pipeline)
    assert torch.allclose(draw(plain, tiny), treated, atol=CHAOS if name == "Kandinsky3Pipeline" else ROUNDING)
    assert (treated - base).abs().mean() > 1e-3


def test_a_lora_upon_a_merged_lora(tmp_path):
    """What is treated wears the first; the printed lines merge it again."""
    tiny = TINY["FluxPipeline"]
    personal = tiny.build()
    base = draw(personal, tiny)
    with_lora(personal, tmp_path, lora_rank=2)
    worn = draw(personal, tiny)
    save_lora(personal, "transformer", tmp_path / "dog")
    pipeline = tiny.build()
    merge_lora(pipeline, str(tmp_path / "dog"))
    assert not pipeline.get_active_adapters()
    assert torch.allclose(draw(pipeline, tiny), worn, atol=ROUNDING) and (worn - base).abs().mean() > 1e-3
    with_lora(pipeline, tmp_path, lora_rank=3)
    treated = draw(pipeline, tiny)
    save_lora(pipeline, "transformer", tmp_path / "lora")
    plain = load_as_printed(tiny, pipeline, tmp_path, base_lora=str(tmp_path / "dog"))
    assert torch.allclose(draw(plain, tiny), treated, atol=ROUNDING) and (treated - worn).abs().mean() > 1e-3


def test_a_lora_that_cannot_be_merged_is_refused(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"`base_lora` is .*none', which this FluxPipeline cannot load"):
        merge_lora(TINY["FluxPipeline"].build(), str(tmp_path / "none"))
    with pytest.raises(ValueError, match="a PixArtAlphaPipeline loads no LoRA itself"):
        merge_lora(tiny_pixart(), str(tmp_path / "none"))


@pytest.mark.parametrize("name", FORMS)
def test_the_printed_scale_is_a_scale_of_the_lora(tmp_path, name):
    """Half the strength is half the alpha."""
    tiny = TINY[name]
    half = tiny.build()
    with_lora(half, tmp_path, lora_alpha=2)
    full = tiny.build()
    with_lora(full, tmp_path, lora_alpha=4)
    save_lora(full, denoiser_name(full), tmp_path / "lora")
    plain = load_as_printed(tiny, full, tmp_path, scale=0.5)
    assert torch.allclose(draw(plain, tiny), draw(half, tiny), atol=ROUNDING)
    assert not torch.allclose(draw(full, tiny), draw(half, tiny), atol=1e-3)


@pytest.mark.parametrize("name", FORMS)
def test_a_lora_is_read_back_into_the_adapter(tmp_path, name):
    pipeline = TINY[name].build()
    with_lora(pipeline, tmp_path)
    component = denoiser_name(pipeline)
    before = {n: w.clone() for n, w in getattr(pipeline, component).named_parameters() if w.requires_grad}
    save_lora(pipeline, component, tmp_path / "lora")
    assert lora_files(tmp_path / "lora") and not lora_files(tmp_path)
    save_lora(pipeline, component, tmp_path, weight_name="other.safetensors")
    for path in (tmp_path / "lora", tmp_path / "other.safetensors"):
        for weight in (w for w in getattr(pipeline, component).parameters() if w.requires_grad):
            weight.data.zero_()
        load_lora(getattr(pipeline, component), component, path)
        after = dict(getattr(pipeline, component).named_parameters())
        assert all(torch.equal(value, after[n]) for n, value in before.items())
    with pytest.raises(ValueError, match="has no LoRA"):
        load_lora(getattr(pipeline, component), component, tmp_path.parent)


def test_a_denoiser_unknown_to_diffusers_is_trained_resumed_and_saved(tmp_path):
    """PixArt's transformer has no `add_adapter`: a folder of PEFT is written, by checkpoints too."""
    parts = {"regularization_dataset": None}
    changes = {
        "max_sequence_length": None,
        "num_inference_steps": 2,
        "resolution": 32,
        "save_strategy": "steps",
        "save_steps": 1,
        "pipeline_kwargs": {"use_resolution_binning": False, "clean_caption": False},
    }
    whole = tiny_trainer(tmp_path / "whole", tiny_pixart(), parts, **changes)
    whole.train()
    first = tiny_trainer(tmp_path / "run", tiny_pixart(), parts, max_steps=1, **changes)
    first.train()
    resumed = tiny_trainer(tmp_path / "run", tiny_pixart(), parts, **changes)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert [path.name for path in lora_files(tmp_path / "run")] == ["adapter_model.safetensors", "adapter_config.json"]
    weights = {n: w for n, w in whole.rollout.denoiser.named_parameters() if w.requires_grad}
    again = dict(resumed.rollout.denoiser.named_parameters())
    assert weights and all(torch.equal(value, again[n]) for n, value in weights.items())


def test_flux_keeps_the_text_s_projections_without_an_adapter():
    """What the paper's figures were made with: an adapter on `add_q_proj` would change them."""
    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), in_channels=16,
    )  # fmt: skip
    assert attention_projections(model) == ["to_q", "to_k", "to_v", "to_out.0"]
