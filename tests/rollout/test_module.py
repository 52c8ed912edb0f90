# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The rollout against the pipelines' own calls, a hand-written loop and finite differences."""

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from fixtures.classic_pipelines import tiny_sana
from fixtures.pipelines import add_lora, tiny_flux, tiny_lcm, tiny_qwen, tiny_sdxl
from peft import LoraConfig

from diffusers_diffdoctor.rollout import DifferentiableRollout
from diffusers_diffdoctor.rollout.call import PipelineCall


PROMPTS = ["one cat", "two dog", "red hat"]  # of one length, so that they share a batch everywhere
SEEDS = [3, 1, 2]


def make(pipeline, **kwargs):
    settings = {"height": 32, "width": 32, "num_inference_steps": 4, "gradient_fraction": 0.5} | kwargs
    if type(pipeline).__name__ == "FluxPipeline":
        settings.setdefault("max_sequence_length", 16)
    if type(pipeline).__name__ == "PixArtAlphaPipeline":
        settings["pipeline_kwargs"] = {"clean_caption": False} | settings.get("pipeline_kwargs", {})
    return DifferentiableRollout(pipeline, **settings)


def own_images(rollout, prompts, seeds):
    """What the pipeline itself makes of the prompts."""
    pipeline = rollout.pipeline
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(prompt=prompts, **rollout.call_kwargs, generator=generators, output_type="pt").images.float()


def weigh(images):
    """A scalar that depends on every pixel in another way."""
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return (images * weights.to(images.dtype)).sum()


def gradients(rollout, weights, prompts=PROMPTS[:2], seeds=(3, 1)):
    for weight in weights.values():
        weight.grad = None
    weigh(rollout(list(prompts), list(seeds)).images).backward()
    return {name: weight.grad for name, weight in weights.items()}


# --- images ----------------------------------------------------------------------------------------------------------------


def test_images_are_the_pipelines_own(any_pipeline):
    rollout = make(any_pipeline)
    add_lora(any_pipeline)
    expected = own_images(rollout, PROMPTS, SEEDS)
    output = rollout(PROMPTS, SEEDS)
    assert output.images.shape == (3, 3, 32, 32)
    assert output.images.dtype == torch.float32
    assert output.prediction is None
    assert output.target is None
    torch.testing.assert_close(output.images, expected, rtol=0, atol=1e-6)


def test_a_seed_gives_the_same_image_in_every_batch(any_pipeline):
    rollout = make(any_pipeline)
    noise = []
    rollout.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: noise.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    together = rollout.generate(PROMPTS, SEEDS, batch_size=3)
    first = noise[0][:3]  # guidance repeats them
    noise.clear()
    alone = rollout.generate(PROMPTS, SEEDS, batch_size=1)
    calls = len(noise) // 3
    assert torch.equal(torch.cat([noise[i * calls][:1] for i in range(3)]), first)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    assert not together.requires_grad
    assert torch.equal(rollout.generate(PROMPTS, SEEDS, batch_size=3), together)
    assert (rollout.generate(PROMPTS[:1], [8]) - together[:1]).abs().max() > 0.01


# --- gradients -------------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_finite_differences(any_pipeline, in_float64):
    any_pipeline.to(torch.float64)
    weights = add_lora(any_pipeline)
    for weight in weights.values():
        weight.data = weight.data.double()
    rollout = make(any_pipeline, num_inference_steps=2, gradient_fraction=1.0)
    found = gradients(rollout, weights)
    assert rollout(["a cat"], [3]).images.dtype == torch.float64
    generator = torch.Generator().manual_seed(5)
    names = list(weights)
    # all weights together, then one tensor at a time: the first, the last and one between
    for moved in (names, names[:1], names[len(names) // 2 : len(names) // 2 + 1], names[-1:]):
        directions = {n: torch.randn(weights[n].shape, generator=generator, dtype=torch.float64) for n in moved}
        values = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                for name, direction in directions.items():
                    weights[name] += step * direction
                values.append(weigh(rollout(PROMPTS[:2], [3, 1]).images).item())
                for name, direction in directions.items():
                    weights[name] -= step * direction
        expected = (values[0] - values[1]) / 2e-4
        assert sum((found[name] * directions[name]).sum().item() for name in moved) == pytest.approx(
            expected, rel=1e-5
        )


def test_flux_equals_a_loop_written_by_hand(flux):
    weights = add_lora(flux)
    rollout = make(flux)
    output = rollout(PROMPTS[:2], [3, 1])
    found = gradients(rollout, weights)
    for weight in weights.values():
        weight.grad = None

    with torch.no_grad():
        text, pooled, text_ids = flux.encode_prompt(PROMPTS[:2], None, max_sequence_length=16)
    noise = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (3, 1)])
    tokens = noise.view(2, 4, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 64, 16)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    image_ids = torch.stack([torch.zeros(8, 8), rows, columns], dim=-1).reshape(64, 3)
    sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]
    for i in range(4):
        with torch.set_grad_enabled(i >= 2):
            velocity = flux.transformer(
                hidden_states=tokens,
                timestep=torch.full((2,), sigmas[i]),
                pooled_projections=pooled,
                encoder_hidden_states=text,
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]
            tokens = tokens + (sigmas[i + 1] - sigmas[i]) * velocity
    latents = tokens.view(2, 8, 8, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 16, 16)
    images = flux.vae.decode(latents / 0.3611 + 0.1159, return_dict=False)[0] / 2 + 0.5
    torch.testing.assert_close(output.images, images, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.latents, tokens, rtol=0, atol=1e-6)
    weigh(images).backward()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=1e-6)
        assert found[name].abs().sum() > 0


class Probe:
    """Scales what the denoiser says in its i-th call by `scales[i]`: the gradient of a scale shows whether the call has one."""

    def __init__(self, denoiser, calls):
        self.scales, self.calls = torch.ones(calls, requires_grad=True), 0
        denoiser.register_forward_hook(self.scale)

    def scale(self, module, args, output):
        scale, self.calls = self.scales[self.calls], self.calls + 1
        return (output[0] * scale,)


@pytest.mark.parametrize(("fraction", "first"), [(0.25, 3), (0.5, 2), (0.6, 1), (1.0, 0)])
def test_gradient_flows_through_the_last_steps_only(any_pipeline, fraction, first):
    weights = add_lora(any_pipeline)
    rollout = make(any_pipeline, gradient_fraction=fraction)
    probe = Probe(rollout.denoiser, 4)
    found = gradients(rollout, weights)
    assert probe.calls == 4
    assert rollout.gradient_steps == 4 - first
    assert (probe.scales.grad[:first] == 0).all()
    assert (probe.scales.grad[first:] != 0).all()
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_the_window_counts_steps_where_guidance_takes_two_calls(flux):
    rollout = make(flux, pipeline_kwargs={"negative_prompt": "blurry", "true_cfg_scale": 2.0})
    probe = Probe(rollout.denoiser, 8)
    weigh(rollout(["a cat"], [0]).images).backward()
    assert probe.calls == 8
    assert (probe.scales.grad != 0).tolist() == [False] * 4 + [True] * 4


def test_the_window_counts_steps_where_a_scheduler_takes_two_calls():
    pipeline = tiny_sdxl()
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    rollout = make(pipeline)
    probe = Probe(rollout.denoiser, 7)
    weigh(rollout(["a cat"], [0]).images).backward()
    assert probe.calls == 7  # the last step has no correction
    assert (probe.scales.grad != 0).tolist() == [False] * 3 + [True] * 4  # half of the scheduler's own seven


@pytest.mark.parametrize(
    ("steps", "fraction", "window"),
    [
        (4, 0.25, 1),
        (4, 1e-12, 1),
        (10, 0.25, 3),
        (10, 0.3, 3),
        (100, 0.07, 7),
        (3, 0.01, 1),
        (1, 1.0, 1),
        (50, 0.5, 25),
    ],
)
def test_the_window_is_a_whole_number_of_steps(flux, steps, fraction, window):
    assert make(flux, num_inference_steps=steps, gradient_fraction=fraction).gradient_steps == window


def test_saturated_pixels_get_gradient(flux):
    weights = add_lora(flux)
    flux.vae.decoder.conv_out.bias.data += 3.0
    rollout = make(flux)
    images = rollout(["a cat"], [0]).images
    assert (images == 1).all()
    images.sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in weights.values())
    outside = torch.tensor([2.0], requires_grad=True)
    flux.image_processor.denormalize(outside).backward()
    assert outside.grad == 0  # the pipeline has its own clamp back


def test_a_safety_checker_is_left_out():
    pipeline = tiny_lcm()
    expected = make(pipeline)(["a cat"], [0]).images
    vars(pipeline)["safety_checker"] = checker = object()  # calling it would fail, as numpy arrays of a graph do
    images = make(pipeline)(["a cat"], [0]).images
    torch.testing.assert_close(images, expected)
    assert pipeline.safety_checker is checker


def test_a_safety_checker_that_must_be_there_is_asked_nothing():
    """Cosmos refuses to run without one, and calls methods of it."""

    class Guard:
        def check_text_safety(self, text):
            raise AssertionError("asked")

    pipeline = tiny_lcm()
    vars(pipeline)["safety_checker"] = guard = Guard()
    call, seen = PipelineCall(pipeline, "unet"), []
    call.function = lambda pipeline, **kwargs: seen.append(pipeline.safety_checker) or [torch.zeros(1)]
    call()
    (stand_in,) = seen
    assert stand_in.to("cpu").check_text_safety("a cat") and stand_in.check_video_safety("frames") == "frames"
    assert pipeline.safety_checker is guard


def test_only_a_loras_dropout_follows_training(flux):
    flux.transformer.requires_grad_(False)
    flux.transformer.add_adapter(LoraConfig(r=2, lora_dropout=0.5, target_modules=["to_q"]))
    rollout = make(flux).train()
    assert rollout.training
    training = {name for name, module in rollout.denoiser.named_modules() if module.training}
    assert training and all("lora_dropout" in name for name in training)
    rollout.eval()
    assert not any(module.training for module in rollout.modules())


def test_the_default_size_is_that_of_the_signature_or_of_the_config(flux):
    sana = make(tiny_sana(), height=None, width=None, pipeline_kwargs={"clean_caption": False})
    assert (sana.height, sana.width) == (1024, 1024)  # its `__call__` says so
    assert not sana.call_kwargs["use_resolution_binning"]
    rollout = make(flux, height=None, width=48)
    assert (rollout.height, rollout.width) == (flux.default_sample_size * flux.vae_scale_factor, 48)


def test_checkpointing_recomputes_and_changes_no_gradient(any_pipeline):
    weights = add_lora(any_pipeline)
    rollout = make(any_pipeline)
    runs = {"denoiser": 0, "vae": 0}

    def count(module, name):
        module.register_forward_pre_hook(lambda *_: runs.update({name: runs[name] + 1}))

    count(next(m for m in rollout.denoiser.modules() if "Attention" in type(m).__name__), "denoiser")
    count(any_pipeline.vae.decoder.mid_block.resnets[0], "vae")
    plain = gradients(rollout, weights)
    before = dict(runs)
    rollout.enable_gradient_checkpointing()
    assert not rollout.vae_gradient_checkpointing
    rollout.vae_gradient_checkpointing = True
    possible = any_pipeline.vae._supports_gradient_checkpointing  # if not, a warning says so
    assert rollout.vae_gradient_checkpointing == possible
    checkpointed = gradients(rollout, weights)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in weights)
    assert runs["vae"] - before["vae"] == 1 + possible  # one forward, one recomputation
    assert runs["denoiser"] - before["denoiser"] > before["denoiser"]
    rollout.vae_gradient_checkpointing = False
    assert not rollout.vae_gradient_checkpointing


def test_half_precision_pipelines_train_a_float32_lora(any_pipeline):
    any_pipeline.to(torch.bfloat16)
    weights = add_lora(any_pipeline)
    for weight in weights.values():
        weight.data = weight.data.float()
    rollout = make(any_pipeline)
    rollout.cache_prompts(["a cat", "two dogs"])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = rollout(["a cat"], [3]).images
    images = rollout(["a cat"], [3]).images
    assert images.dtype == mixed.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    found = gradients(rollout, weights)
    assert all(gradient.dtype == torch.float32 and gradient.abs().sum() > 0 for gradient in found.values())


def test_float16_gives_the_gradient_where_the_loss_is_scaled(caplog):
    """SDXL's VAE stays in float32 all the time; what is below the range of float16 is the user's to scale."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        pipeline = tiny_sdxl().to(dtype)
        pipeline.vae.register_to_config(force_upcast=True)
        weights = add_lora(pipeline)
        for weight in weights.values():
            weight.data = weight.data.float()
        rollout = make(pipeline, num_inference_steps=2)
        (rollout(PROMPTS[:1], [0]).images.mean() * 2**16).backward()
        found[dtype] = torch.cat([weight.grad.flatten() for weight in weights.values()])
    assert "GradScaler" in caplog.text
    assert torch.cosine_similarity(found[torch.float16], found[torch.float32], dim=0) > 0.95  # 0.977 with torch 2.10
    assert found[torch.float16].norm() == pytest.approx(found[torch.float32].norm().item(), rel=0.05)


def test_without_gradients_there_is_no_graph(flux):
    add_lora(flux)
    with torch.no_grad():
        output = make(flux)(["a cat"], [0])
        assert not torch.is_grad_enabled()
    assert not output.images.requires_grad
    assert not output.latents.requires_grad


# --- what it leaves behind -------------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


@pytest.mark.parametrize("call", [0, 1, 3])
def test_everything_is_as_before_after_an_error(any_pipeline, call):
    add_lora(any_pipeline)
    rollout = make(any_pipeline)
    any_pipeline.set_progress_bar_config(desc="mine", disable=True)
    any_pipeline.watermark = mark = object()  # as SDXL has where its package is installed
    before = rollout.generate(["a cat"], [0])
    calls = 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise Broken

    hook = rollout.denoiser.register_forward_pre_hook(fail)
    for enabled in (True, False):
        calls = 0
        with torch.set_grad_enabled(enabled):
            with pytest.raises(Broken):
                rollout(["a cat"], [0])
            assert torch.is_grad_enabled() == enabled
    hook.remove()
    assert "step" not in vars(any_pipeline.scheduler)
    assert "denormalize" not in vars(any_pipeline.image_processor)
    assert any_pipeline._progress_bar_config == {"desc": "mine", "disable": True}
    assert any_pipeline.watermark is mark
    assert torch.equal(rollout.generate(["a cat"], [0]), before)


def test_the_denoiser_is_the_only_submodule(any_pipeline):
    weights = add_lora(any_pipeline)
    rollout = make(any_pipeline)
    denoiser = getattr(any_pipeline, rollout.denoiser_name)
    assert list(rollout.children()) == [denoiser]
    assert rollout.denoiser is denoiser
    assert [p for p in rollout.parameters() if p.requires_grad] == list(weights.values())
    others = [m for m in any_pipeline.components.values() if isinstance(m, torch.nn.Module) and m is not denoiser]
    assert not any(p.requires_grad for m in others for p in m.parameters())
    assert not any(m.training for m in others)


# --- prompts ---------------------------------------------------------------------------------------------------------------


def test_cached_prompts_give_the_same_images(any_pipeline):
    rollout = make(any_pipeline)
    expected = own_images(rollout, PROMPTS, SEEDS)
    rollout.cache_prompts([*PROMPTS, PROMPTS[0]])
    rollout.free_text_encoders()
    assert getattr(any_pipeline, "text_encoder", None) is None
    assert getattr(any_pipeline, "tokenizer", None) is None
    torch.testing.assert_close(rollout.generate(PROMPTS, SEEDS), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(rollout(PROMPTS[1:2], SEEDS[1:2]).images, expected[1:2], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="'a bird' was not cached"):
        rollout([PROMPTS[0], "a bird"], [0, 1])
    with pytest.raises(ValueError, match="'a fish' was not cached"):
        rollout.cache_prompts([PROMPTS[0], "a fish"])


def test_each_prompt_is_encoded_once(flux):
    rollout, encoded = make(flux), []
    flux.text_encoder.register_forward_pre_hook(lambda module, args: encoded.append(args[0][:, 1].tolist()))
    rollout.cache_prompts([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    rollout.cache_prompts([PROMPTS[2], PROMPTS[0]])
    rollout.generate(PROMPTS, SEEDS)
    first = [flux.tokenizer(prompt).input_ids[1] for prompt in PROMPTS]
    # the first of all also twice in one batch, to see what of the result grows with it
    assert encoded == [[first[0]], [first[0]] * 2, [first[1]], [first[2]]]


def test_prompts_of_other_lengths_are_not_padded_to_one_another():
    """Each image is the one that the pipeline draws of its prompt alone; those of one length share a batch."""
    pipeline = tiny_qwen()
    rollout = make(pipeline)
    prompts, seeds = ["a cat", "two dogs", "a dog and a cat", "a dog"], [3, 1, 2, 5]
    expected = torch.cat([own_images(rollout, [prompt], [seed]) for prompt, seed in zip(prompts, seeds)])
    rollout.cache_prompts(prompts)
    calls = []
    pipeline.transformer.register_forward_hook(lambda module, args, output: calls.append(len(output[0])))
    torch.testing.assert_close(rollout.generate(prompts, seeds), expected, rtol=0, atol=1e-6)
    assert calls == [2] * 4 + [1] * 8


def test_embeddings_made_elsewhere_stand_for_a_prompt(flux):
    rollout = make(flux)
    expected = rollout.generate(PROMPTS[:2], [0, 1])
    given = {prompt: flux.encode_prompt([prompt], None, max_sequence_length=16) for prompt in PROMPTS[:2]}
    flux.text_encoder = flux.text_encoder_2 = flux.tokenizer = flux.tokenizer_2 = None
    for prompt, result in given.items():
        rollout.cache_embeddings(prompt, result)
    torch.testing.assert_close(rollout.generate(PROMPTS[:2], [0, 1]), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="'red hat' was not cached"):
        rollout.generate(PROMPTS, SEEDS)


@pytest.mark.parametrize(
    ("build", "extra"),
    [
        (tiny_flux, {"negative_prompt": "blurry", "true_cfg_scale": 2.0}),
        (tiny_qwen, {"negative_prompt": "blurry", "true_cfg_scale": 2.0}),
        (tiny_sdxl, {"negative_prompt": "blurry", "negative_prompt_2": "dark", "prompt_2": "in the rain"}),
    ],
)
def test_other_texts_are_cached_with_the_prompt(build, extra):
    pipeline = build()
    plain = make(pipeline).generate(["a cat"], [0])
    rollout = make(pipeline, pipeline_kwargs=extra)
    expected = own_images(rollout, ["a cat"], [0])
    assert (plain - expected).abs().max() > 1e-4
    rollout.cache_prompts(["a cat", "hand"])
    rollout.free_text_encoders()
    torch.testing.assert_close(rollout.generate(["a cat"], [0]), expected, rtol=0, atol=1e-6)


def test_guidance_and_other_arguments_reach_the_pipeline():
    pipeline = tiny_sdxl()
    images = [make(pipeline, guidance_scale=scale).generate(["a cat"], [0]) for scale in (None, 5.0, 1.0)]
    assert torch.equal(images[0], images[1])  # the pipeline's default
    assert (images[2] - images[1]).abs().max() > 1e-4
    rollout = make(pipeline, pipeline_kwargs={"guidance_rescale": 0.7})
    assert (rollout.generate(["a cat"], [0]) - images[0]).abs().max() > 1e-5
    torch.testing.assert_close(
        rollout.generate(["a cat"], [0]), own_images(rollout, ["a cat"], [0]), rtol=0, atol=1e-6
    )


# --- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gradient_fraction": 0}, "window of 0 steps"),
        ({"gradient_fraction": 1.5}, "`gradient_fraction` is 1.5"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"height": 33}, "`height` is 33, but must be a positive multiple of 4"),
        ({"width": 0}, "`width` is 0"),
        ({"pipeline_kwargs": {"guidance": 3}}, "'guidance'.*accepts"),
        ({"pipeline_kwargs": {"generator": None}}, "'generator'.*rollout sets"),
        ({"pipeline_kwargs": {"sigmas": [1.0, 0.5]}}, "2 sigmas, but `num_inference_steps` is 4"),
        ({"offline_sigmas": "cosine"}, "`offline_sigmas` is 'cosine'"),
    ],
)
def test_arguments_that_cannot_work_are_named(flux, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(flux, **kwargs)


def test_an_argument_the_pipeline_does_not_take_is_named():
    with pytest.raises(ValueError, match="`max_sequence_length` is no argument of StableDiffusionXLPipeline"):
        make(tiny_sdxl(), max_sequence_length=77)


def test_a_pipeline_that_cannot_be_treated_is_refused(flux):
    with pytest.raises(TypeError, match="`pipeline` is a str"):
        DifferentiableRollout("flux")
    flux.transformer = None
    with pytest.raises(ValueError, match="neither a transformer nor a unet"):
        DifferentiableRollout(flux)


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [
        ([], [], "`prompts` is"),
        ("a cat", [0], "`prompts` is 'a cat'"),
        (["a", "b"], [0], "1 numbers for 2"),
        (["a"], None, "missing"),
    ],
)
def test_prompts_and_seeds_are_checked(flux, prompts, seeds, message):
    with pytest.raises(ValueError, match=message):
        make(flux)(prompts, seeds)


def test_the_size_is_the_pipelines_own_by_default():
    assert DifferentiableRollout(tiny_flux()).height == 128 * 2
    rollout = DifferentiableRollout(tiny_sdxl(), width=64)
    assert (rollout.height, rollout.width) == (32, 64)
    assert rollout.generate(["a cat"], [0]).shape == (1, 3, 32, 64)


# --- drift -----------------------------------------------------------------------------------------------------------------


def drift_by_hand(rollout, prompts, seeds):
    """What the pipeline's own call asks the denoiser, asked again without the adapter."""
    calls, denoiser = [], rollout.denoiser
    hook = denoiser.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )
    own_images(rollout, prompts, seeds)
    hook.remove()
    per_step = len(calls) // rollout.num_inference_steps  # two where guidance asks apart
    total, weights = torch.zeros(len(prompts)), 0.0
    lora = {name: w.data.clone() for name, w in denoiser.named_parameters() if "lora_B" in name}
    for name, weight in denoiser.named_parameters():  # the adapter off, in another way
        weight.data.mul_(0 if "lora_B" in name else 1)
    for i, (args, kwargs, treated) in enumerate(calls):
        weight = (1 - i // per_step / rollout.num_inference_steps) ** 8
        if weight < 0.1:
            continue
        with torch.no_grad():
            untreated = denoiser(*args, **kwargs)[0]
        square = (treated[0] - untreated).square().flatten(1).mean(1)
        total += weight * torch.stack([square[j :: len(prompts)].mean() for j in range(len(prompts))])
        weights += weight
    for name, weight in denoiser.named_parameters():
        if name in lora:
            weight.data.copy_(lora[name])
    return total / weights


def test_drift_is_what_the_adapter_changes_in_the_early_steps(any_pipeline):
    rollout = make(any_pipeline)
    with pytest.raises(ValueError, match=r"`drift` .*add_adapter"):
        rollout(PROMPTS, SEEDS, drift=True)
    add_lora(any_pipeline)
    expected = drift_by_hand(rollout, PROMPTS, SEEDS)
    assert (expected > 0).all()
    output = rollout(PROMPTS, SEEDS, drift=True)
    torch.testing.assert_close(output.drift, expected, rtol=1e-3, atol=1e-9)
    assert rollout(PROMPTS, SEEDS).drift is None
    torch.testing.assert_close(output.images, rollout(PROMPTS, SEEDS).images, rtol=0, atol=0)


def test_drift_reaches_the_steps_before_the_window_and_leaves_the_pixel_gradient_alone():
    pipeline = tiny_flux()
    rollout = make(pipeline, gradient_fraction=0.25)
    weights = add_lora(pipeline)
    without = gradients(rollout, weights)
    for weight in weights.values():
        weight.grad = None
    output = rollout(PROMPTS[:2], [3, 1], drift=True)
    weigh(output.images).backward(retain_graph=True)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad, without[name], rtol=0, atol=0)
        weight.grad = None
    output.drift.sum().backward()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights.values())


def test_the_gradient_of_the_drift_agrees_with_finite_differences(in_float64):
    pipeline = tiny_flux().to(torch.float64)
    rollout = make(pipeline, num_inference_steps=4, gradient_fraction=0.25)  # both counted steps lie before the window
    weights = add_lora(pipeline)
    weight = next(weight for name, weight in weights.items() if "lora_B" in name)
    rollout(["a cat"], [3], drift=True).drift.sum().backward()
    # the latents are not differentiated through: hold them where they are
    calls = []
    hook = rollout.denoiser.register_forward_hook(lambda _, a, k, out: calls.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        rollout(["a cat"], [3])
    hook.remove()

    @torch.no_grad()
    def drift():
        total = 0.0
        for (args, kwargs), share in zip(calls, (1.0, (3 / 4) ** 8)):
            treated = rollout.denoiser(*args, **kwargs)[0]
            rollout.denoiser.disable_adapters()
            total += share * (treated - rollout.denoiser(*args, **kwargs)[0]).square().mean().item()
            rollout.denoiser.enable_adapters()
        return total / (1 + (3 / 4) ** 8)

    direction, size = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(0)), 1e-5
    slope = (weight.grad * direction).sum().item()
    values = []
    for sign in (1, -1):
        weight.data += sign * size * direction
        values.append(drift())
        weight.data -= sign * size * direction
    assert slope == pytest.approx((values[0] - values[1]) / (2 * size), rel=1e-4)
    assert slope != 0
