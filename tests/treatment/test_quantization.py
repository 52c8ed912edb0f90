# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Treatment of a quantized base: int8 for real, on the miniature and on tiny weights; nf4 as far as a CPU goes."""

import sys

import diffusers
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from fixtures.pipelines import tiny_flux
from fixtures.trainer import PROMPTS, assert_same, lora_of, tiny_args, tiny_trainer
from peft import LoraConfig

from diffusers_diffdoctor import DifferentiableRollout, PixelRewardConfig, miniature
from diffusers_diffdoctor.treatment.adapter import add_lora, plain_values
from diffusers_diffdoctor.treatment.checkpoint import describe_base
from diffusers_diffdoctor.treatment.prepare import load_pipeline
from diffusers_diffdoctor.treatment.quantization import quantization_config


def needs_torchao():
    pytest.importorskip("torchao", reason="int8 needs torchao: pip install 'diffusers-diffdoctor[quantization]'")


def linear_weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [part.weight for part in module.modules() if isinstance(part, torch.nn.Linear)]


def image_and_gradient(quantization: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    pipeline = load_pipeline(miniature.load("pipeline"), torch.float32, quantization)
    add_lora(pipeline, "transformer", tiny_args("unused", lora_rank=4))
    generator = torch.Generator().manual_seed(1)
    weights = [weight for weight in pipeline.transformer.parameters() if weight.requires_grad]
    for weight in weights:
        assert weight.dtype == torch.float32
        weight.data = 0.02 * torch.randn(weight.shape, generator=generator)
    rollout = DifferentiableRollout(pipeline, height=64, width=64, num_inference_steps=4)
    images = rollout([row["prompt"] for row in miniature.prompts("train")[:2]], seeds=[0, 1]).images
    (images * torch.linspace(-1, 1, images.numel()).reshape(images.shape)).sum().backward()
    return images.detach(), torch.cat([weight.grad.flatten() for weight in weights])


def test_int8_draws_and_learns_nearly_as_the_unquantized_miniature():
    needs_torchao()
    images, gradient = image_and_gradient(None)
    quantized_images, quantized_gradient = image_and_gradient("int8")
    difference = (quantized_images - images).abs().mean()
    assert 1e-5 < difference < 0.01
    assert torch.cosine_similarity(quantized_gradient, gradient, dim=0) >= 0.999


def test_int8_stores_denoiser_and_text_encoders_in_one_byte_per_weight(tmp_path):
    needs_torchao()
    tiny_flux().save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path, torch.float32, "int8")
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        weights = linear_weights(part)
        assert weights and all(torch.int8 in {value.dtype for value in plain_values(weight)} for weight in weights)
        assert not any(weight.requires_grad for weight in part.parameters())
    assert all(plain_values(weight)[0].dtype == torch.float32 for weight in pipeline.vae.parameters())


def test_the_base_of_a_quantized_checkpoint_is_known(tmp_path):
    """The digest is the same for the same folder, and another for other weights and for the unquantized ones."""
    needs_torchao()
    tiny_flux(seed=0).save_pretrained(tmp_path / "base")
    tiny_flux(seed=1).save_pretrained(tmp_path / "other")

    def digest(folder, quantization):
        return describe_base(load_pipeline(tmp_path / folder, torch.float32, quantization), "transformer")["digest"]

    assert digest("base", "int8") == digest("base", "int8")
    assert len({digest("base", "int8"), digest("other", "int8"), digest("base", None)}) == 3


def test_a_quantized_treatment_resumes_bit_for_bit_and_fits_the_unquantized_base(tmp_path):
    needs_torchao()
    base = tmp_path / "base"
    tiny_flux().save_pretrained(base)
    changes = {"quantization": "int8", "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1}
    whole = tiny_trainer(tmp_path / "whole", base, max_steps=3, **changes)
    before = whole.generate(PROMPTS[:1], [0], treated=False)
    whole.train()
    whole.save_model()
    tiny_trainer(tmp_path / "run", base, max_steps=2, **changes).train()
    resumed = tiny_trainer(tmp_path / "run", base, max_steps=3, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert_same(lora_of(resumed), lora_of(whole))

    with pytest.raises(ValueError, match="treats the pipeline"):  # it was trained against other weights
        tiny_trainer(tmp_path / "run", base, max_steps=4, **(changes | {"quantization": None})).train(
            resume_from_checkpoint=True
        )

    plain = DiffusionPipeline.from_pretrained(base)
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(tmp_path / "whole")
    size = {"height": 16, "width": 16, "num_inference_steps": 4, "max_sequence_length": 16}
    seed = torch.Generator().manual_seed(0)
    drawn = plain(PROMPTS[:1], **size, generator=seed, output_type="pt").images
    treated = whole.generate(PROMPTS[:1], [0])
    effect = (treated - before).abs().mean()
    assert (drawn - treated).abs().mean() < 0.1 * effect


def test_an_adapter_of_one_s_own_goes_on_a_quantized_base(tmp_path):
    needs_torchao()
    tiny_flux().save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path, torch.float32, "int8")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"])
    assert add_lora(pipeline, "transformer", tiny_args(tmp_path), config).r == 2


def test_a_loaded_pipeline_cannot_be_quantized_any_more():
    with pytest.raises(ValueError, match="`quantization` is 'int8', but `pipeline` is loaded already"):
        load_pipeline(tiny_flux(), torch.float32, "int8")


def test_an_unknown_quantization_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`quantization` is 'int4', but must be one of \('int8', 'nf4'\)"):
        PixelRewardConfig(str(tmp_path), quantization="int4")
    with pytest.raises(ValueError, match="`quantization` is 'int4'"):
        load_pipeline(tmp_path, torch.float32, "int4")


def test_int8_without_torchao_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    tiny_flux().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"torchao is not installed.*diffusers-diffdoctor\[quantization\]"):
        load_pipeline(tmp_path, torch.float32, "int8")


# --- nf4 -----------------------------------------------------------------------------------------------------------------


def test_nf4_asks_for_the_denoiser_and_the_text_encoders(tmp_path):
    tiny_flux().save_pretrained(tmp_path)
    config = quantization_config(DiffusionPipeline.load_config(str(tmp_path)), "nf4", torch.bfloat16)
    assert set(config.quant_mapping) == {"transformer", "text_encoder", "text_encoder_2"}
    assert type(config.quant_mapping["transformer"]) is diffusers.BitsAndBytesConfig
    assert type(config.quant_mapping["text_encoder_2"]) is transformers.BitsAndBytesConfig
    for part in config.quant_mapping.values():
        assert part.load_in_4bit and part.bnb_4bit_quant_type == "nf4"
        assert part.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nf4_without_a_gpu_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="`quantization` is 'nf4', which needs a GPU"):
        load_pipeline("somebody/large-pipeline", torch.float32, "nf4")


@pytest.mark.gpu
def test_nf4_is_trained_and_fits_the_unquantized_base(tmp_path):
    base = tmp_path / "base"
    tiny_flux().save_pretrained(base)
    trainer = tiny_trainer(tmp_path / "run", base, quantization="nf4", use_cpu=False)
    assert {weight.dtype for weight in trainer.trained_parameters} == {torch.float32}
    trainer.train()
    trainer.save_model()
    plain = DiffusionPipeline.from_pretrained(base)
    plain.load_lora_weights(tmp_path / "run")
    assert plain.get_active_adapters()
