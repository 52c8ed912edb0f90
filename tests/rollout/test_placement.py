# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Where gradient flows, against definitions written by hand: their own loop, their own arithmetic, on FLUX and on SDXL."""

import json
from dataclasses import dataclass

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.configuration_utils import FrozenDict
from fixtures.classic_pipelines import tiny_sana_sprint
from fixtures.pipelines import add_lora, tiny_flux, tiny_sd3, tiny_sdxl

from diffusers_diffdoctor.rollout import PLACEMENTS, DifferentiableRollout, Placement, Steps, placement_of
from diffusers_diffdoctor.rollout.clean import noise_levels
from diffusers_diffdoctor.rollout.placement import Last, Leap, LowVariance, OneLateStep, RandomWindow, Sparse
from diffusers_diffdoctor.rollout.window import GradientWindow
from diffusers_diffdoctor.seeds import derive_seed


PROMPTS, SEEDS = ["one cat", "two dog"], [3, 1]


def weigh(images):
    """A scalar that depends on every pixel in another way."""
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    return (images * weights).sum()


def noise(shape, seeds=SEEDS):
    return torch.cat([torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class Flux:
    """Its denoiser, its levels and its decoder, without its loop: x' = x + (s' - s) v."""

    sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]
    kwargs = {"max_sequence_length": 16}

    def __init__(self):
        self.pipeline = tiny_flux()
        self.denoiser = self.pipeline.transformer
        with torch.no_grad():
            self.text, self.pooled, self.ids = self.pipeline.encode_prompt(PROMPTS, None, max_sequence_length=16)
        self.start = noise((4, 16, 16)).view(2, 4, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 64, 16)
        rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
        self.image_ids = torch.stack([torch.zeros(8, 8), rows, columns], dim=-1).reshape(64, 3)

    def says(self, x, i):
        return self.pipeline.transformer(
            hidden_states=x,
            timestep=torch.full((2,), self.sigmas[i]),
            pooled_projections=self.pooled,
            encoder_hidden_states=self.text,
            txt_ids=self.ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]

    def decode(self, x):
        latents = x.view(2, 8, 8, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 16, 16)
        return self.pipeline.vae.decode(latents / 0.3611 + 0.1159, return_dict=False)[0] / 2 + 0.5

    def noised(self, x, i, fresh):
        return (1 - self.sigmas[i]) * x + self.sigmas[i] * fresh


class Sdxl:
    """With guidance, and noise that is added: x' = x + (s' - s) e."""

    kwargs = {"guidance_scale": 3.0}

    def __init__(self):
        self.pipeline = tiny_sdxl()
        self.denoiser = self.pipeline.unet
        self.pipeline.scheduler = EulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        scheduler = EulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(4)
        self.sigmas, self.timesteps = scheduler.sigmas.tolist(), scheduler.timesteps
        with torch.no_grad():
            text, negative, pooled, negative_pooled = self.pipeline.encode_prompt(PROMPTS)
        self.text, self.pooled = torch.cat([negative, text]), torch.cat([negative_pooled, pooled])
        self.start = noise((4, 16, 16)) * float(scheduler.init_noise_sigma)

    def says(self, x, i):
        scaled = torch.cat([x, x]) / (self.sigmas[i] ** 2 + 1) ** 0.5
        conditions = {"text_embeds": self.pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 4)}
        said = self.pipeline.unet(
            scaled, self.timesteps[i], encoder_hidden_states=self.text, added_cond_kwargs=conditions
        ).sample
        without, with_text = said.chunk(2)
        return without + 3.0 * (with_text - without)

    def decode(self, x):
        return self.pipeline.vae.decode(x / self.pipeline.vae.config.scaling_factor).sample / 2 + 0.5

    def noised(self, x, i, fresh):
        return x + self.sigmas[i] * fresh


def trajectory(world):
    """The latents before each step and at the end, without gradient."""
    xs = [world.start]
    with torch.no_grad():
        for i in range(4):
            xs.append(xs[-1] + (world.sigmas[i + 1] - world.sigmas[i]) * world.says(xs[-1], i))
    return xs


def found(world, weights, placement, seed):
    """The images and gradients of the rollout itself."""
    rollout = DifferentiableRollout(
        world.pipeline, height=32, width=32, num_inference_steps=4, placement=placement, **world.kwargs
    )
    for weight in weights.values():
        weight.grad = None
    output = rollout(PROMPTS, SEEDS, placement_seed=seed)
    weigh(output.images).backward()
    return output, {name: weight.grad.clone() for name, weight in weights.items()}


def same(weights, gradients, images, expected):
    """Images, and gradients, are those of a scalar of images made by hand."""
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)
    for weight in weights.values():
        weight.grad = None
    weigh(expected).backward()
    for name, weight in weights.items():
        scale = weight.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=1e-4 * scale)
        assert scale > 0


@pytest.fixture(params=[Flux, Sdxl], ids=["flux", "sdxl"])
def world(request):
    return request.param()


def chosen(placement, seed, total=4):
    return placement.choose(total, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 3])
def test_sparse_is_each_step_against_the_gradient_of_the_true_image(world, count):
    weights = add_lora(world.pipeline)
    placement = Sparse(count, bias=0.0)
    output, gradients = found(world, weights, placement, seed=5)
    steps = sorted(chosen(placement, 5).chosen)
    assert len(steps) == count and (count == 1 or steps[0] < 2)
    xs = trajectory(world)
    end = xs[-1].clone().requires_grad_()
    images = world.decode(end)
    torch.testing.assert_close(output.images, images, rtol=0, atol=2e-5)
    (gradient,) = torch.autograd.grad(weigh(images), end)
    for weight in weights.values():
        weight.grad = None
    for k in steps:  # one graph after the other
        world.says(xs[k], k).backward((world.sigmas[k + 1] - world.sigmas[k]) * gradient)
    for name, weight in weights.items():
        scale = weight.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=1e-4 * scale)
        assert scale > 0


@pytest.mark.parametrize("settings", [{}, {"discount": 1.0, "tolerance": 0.0}], ids=["paper", "plain"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_leap_is_two_leaps_that_land_where_the_rollout_did(world, settings, seed):
    weights = add_lora(world.pipeline)
    placement = Leap(**settings)
    output, gradients = found(world, weights, placement, seed)
    k, j = sorted(chosen(placement, seed).chosen)
    xs, sigmas = trajectory(world), world.sigmas
    landing = xs[k] + (sigmas[j] - sigmas[k]) * world.says(xs[k], k)
    x = xs[j] + (landing - landing.detach())
    seen = placement.discount * x + (1 - placement.discount) * x.detach()
    belief = x - sigmas[j] * world.says(seen, j)
    weight = torch.ones(2)
    if placement.tolerance:
        distances = [(landing - xs[j]).abs().flatten(1).mean(1), (belief - xs[4]).abs().flatten(1).mean(1)]
        weight = 1 / sum(distance.detach().clamp(min=placement.tolerance) for distance in distances)
    carried = (belief - belief.detach()) * weight.view(2, *[1] * (x.ndim - 1))
    same(weights, gradients, output.images, world.decode(xs[4] + carried))


def test_these_seeds_have_leaps_near_and_far():
    pairs = {seed: sorted(chosen(Leap(), seed).chosen) for seed in (1, 2, 3)}
    assert {j - k > 1 for k, j in pairs.values()} == {True, False}
    assert {j == 3 for _, j in pairs.values()} == {True, False}


def count_forwards(world):
    """Whether gradients were on, for each time that the denoiser really ran."""
    ran, forward = [], world.denoiser.forward

    def counted(*args, **kwargs):
        ran.append(torch.is_grad_enabled())
        return forward(*args, **kwargs)

    world.denoiser.forward = counted
    return ran


def test_refl_shows_what_one_late_step_believes_in(world):
    weights = add_lora(world.pipeline)
    placement = OneLateStep(0.75)
    seen = set()
    for seed in range(8):
        (step,) = chosen(placement, seed).chosen
        if step in seen:
            continue
        seen.add(step)
        ran = count_forwards(world)
        output, gradients = found(world, weights, placement, seed)
        assert ran == [False] * step + [True], "steps after it are not computed"
        del world.denoiser.forward
        x = trajectory(world)[step]
        same(weights, gradients, output.images, world.decode(x - world.sigmas[step] * world.says(x, step)))
    assert seen == {1, 2, 3}


def test_draft_lv_takes_the_last_step_again_from_fresh_noise(world):
    weights = add_lora(world.pipeline)
    output, gradients = found(world, weights, LowVariance(3), seed=0)
    assert output.repeats == 3 and output.images.shape == (6, 3, 32, 32)
    xs = trajectory(world)
    images, x = [], xs[3]
    for number in range(3):
        clean = x - world.sigmas[3] * world.says(x, 3)
        images.append(world.decode(clean))
        fresh = noise(x.shape[1:], [derive_seed("renoise", seed, 3 + number) for seed in SEEDS])
        x = world.noised(clean.detach(), 3, fresh)
    same(weights, gradients, output.images, torch.cat(images))
    with torch.no_grad():  # what it draws for people to see is the pipeline's own image
        rollout = DifferentiableRollout(
            world.pipeline, height=32, width=32, num_inference_steps=4, placement=LowVariance(3), **world.kwargs
        )
        plain = rollout(PROMPTS, SEEDS)
    assert plain.repeats == 1
    torch.testing.assert_close(plain.images, images[0].detach(), rtol=0, atol=2e-5)


def test_alignprop_is_a_window_of_random_length(world):
    weights = add_lora(world.pipeline)
    lengths = [len(chosen(RandomWindow(0.75), seed).chosen) for seed in range(40)]
    assert set(lengths) == {1, 2, 3}
    for length in (1, 3):
        seed = lengths.index(length)
        output, gradients = found(world, weights, RandomWindow(0.75), seed)
        expected, others = found(world, weights, Last(length / 4), 0)
        torch.testing.assert_close(output.images, expected.images, rtol=0, atol=0)
        for name in weights:
            torch.testing.assert_close(gradients[name], others[name], rtol=0, atol=0)


def test_sparse_prefers_late_steps():
    counts = torch.zeros(4)
    for seed in range(600):
        (step,) = chosen(Sparse(1, bias=2.0), seed).chosen
        counts[step] += 1
    expected = 600 * torch.tensor([1.0, 4, 9, 16]) / 30
    assert ((counts - expected).abs() < 4 * expected.sqrt()).all()
    assert chosen(Sparse(9), 0).chosen == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler], ids=lambda one: one.__name__
)
@pytest.mark.parametrize("name", ["sparse", "leap", "refl", "draft_lv"])
def test_every_scheduler_keeps_its_images_and_gets_gradient(name, scheduler):
    pipeline = tiny_sdxl()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    weights = add_lora(pipeline)
    rollout = DifferentiableRollout(
        pipeline, height=32, width=32, num_inference_steps=5, placement=placement_of(name, 0.2), guidance_scale=2.0
    )
    output = rollout(PROMPTS, SEEDS, placement_seed=1)
    torch.testing.assert_close(output.images[:2].detach(), rollout.generate(PROMPTS, SEEDS), rtol=0, atol=1e-4)
    weigh(output.images).backward()
    assert all(weight.grad.isfinite().all() and weight.grad.abs().sum() > 0 for weight in weights.values())


@pytest.mark.parametrize("name", PLACEMENTS)
def test_prompts_that_cannot_share_a_batch_and_drift(name):
    """SD3 with one prompt longer than the other, in any order; and the drift beside it."""
    pipeline = tiny_sd3()
    add_lora(pipeline)
    rollout = DifferentiableRollout(pipeline, height=32, width=32, num_inference_steps=4, placement=placement_of(name))
    rollout.prompts.groups = lambda prompts, arguments: [[1], [0, 2]] if len(prompts) == 3 else [[0]]
    rollout._shares = True
    output = rollout(["a", "b", "c"], [1, 2, 3], drift=True, placement_seed=2)
    assert output.drift.shape == (3,) and len(output.images) == 3 * output.repeats
    alone = [rollout([p], [s], placement_seed=2).images for p, s in (("a", 1), ("b", 2), ("c", 3))]
    torch.testing.assert_close(output.images, torch.stack(alone, 1).flatten(0, 1), rtol=0, atol=1e-4)
    (output.images.mean() + output.drift.sum()).backward()


def test_a_pipeline_that_leaves_a_step_out_has_its_last_one_repeated():
    """SanaSprint's scheduler lists one step more than is taken."""
    pipeline = tiny_sana_sprint()
    add_lora(pipeline)
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "pipeline_kwargs": {"clean_caption": False}}
    rollout = DifferentiableRollout(pipeline, placement=Sparse(2), **settings)
    rollout(["a cat"], [0]).images.mean().backward()
    assert rollout._steps == 2
    assert all(weight.grad is not None for weight in rollout.parameters() if weight.requires_grad)


def test_a_scheduler_without_a_clean_image_is_refused():
    class Own:
        """Steps of its own kind: how clean a sample is, it does not say."""

        config, timesteps = FrozenDict(), torch.arange(2)

        def set_timesteps(self, count):
            pass

        def step(self, model_output, timestep, sample):
            return (sample - model_output,)

    scheduler, denoiser = Own(), torch.nn.Identity()
    with pytest.raises(ValueError, match=r'the Own of this pipeline does not tell .*Use "last" or "sparse"'):
        with GradientWindow(scheduler, Leap()).watch(denoiser):
            scheduler.set_timesteps(2)
            scheduler.step(torch.zeros(1, 1), 0, torch.zeros(1, 1))


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(clip_sample=False),
        EulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(),
    ],
    ids=lambda one: type(one).__name__,
)
def test_levels_are_those_that_the_scheduler_noises_with(scheduler):
    scheduler.set_timesteps(6)
    clean, fresh = torch.full((1, 1), 2.0), torch.full((1, 1), 3.0)
    for number, (signal, level) in enumerate(noise_levels(scheduler)[:6]):
        timestep = scheduler.timesteps[number : number + 1]
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            noised = scheduler.scale_noise(clean, timestep, fresh)
        else:
            noised = scheduler.add_noise(clean, fresh, timestep)
        assert noised.item() == pytest.approx(2 * signal + 3 * level, rel=1e-3, abs=2e-3)
    assert noise_levels(scheduler)[6][1] < 0.1


# --- memory ------------------------------------------------------------------------------------------------------------------


def peak(placement, tmp_path):
    """Bytes that are allocated at once, at most, by forward and backward of a rollout of 8 steps."""
    pipeline = tiny_flux()
    add_lora(pipeline)
    rollout = DifferentiableRollout(
        pipeline, height=64, width=64, num_inference_steps=8, placement=placement, max_sequence_length=16
    )
    rollout.cache_prompts(["a"])
    rollout(["a"], [0]).images.mean().backward()  # what is measured and kept once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        rollout(["a"] * 8, list(range(8))).images.mean().backward()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    return max(totals) - totals[0]


def test_sparse_holds_one_steps_graph_whatever_the_number_of_steps(tmp_path):
    sparse = {count: peak(Sparse(count), tmp_path) for count in (1, 2, 4, 8)}
    chained = {count: peak(Last(count / 8), tmp_path) for count in (1, 2, 4, 8)}
    print({"sparse": sparse, "last": chained})
    one_graph = chained[2] - chained[1]
    assert chained[8] - chained[1] == pytest.approx(7 * one_graph, rel=0.1)
    assert sparse[8] - sparse[1] < one_graph / 3  # its latents
    assert sparse[8] < chained[1]


# --- by name -------------------------------------------------------------------------------------------------------------------


def test_placements_by_name():
    assert placement_of("last", 0.5) == Last(0.5)
    assert placement_of("refl", 0.5, {"fraction": 0.75}) == OneLateStep(0.75)
    assert placement_of("sparse", 0.5, {"steps": 2}) == Sparse(2)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("first", {}, "`gradient_placement` is 'first', but must be one of last, refl"),
        ("sparse", {"count": 2}, r"`gradient_placement_kwargs` has \['count'\], which 'sparse' does not take"),
        ("sparse", {"steps": 0}, "`steps` is 0, but must be at least 1"),
        ("sparse", {"steps": "two"}, "`gradient_placement_kwargs` is .*cannot take"),
        ("leap", {"discount": 1.5}, "`discount` is 1.5"),
        ("draft_lv", {"repeats": 0}, "`repeats` is 0"),
        ("last", {"fraction": 0}, "window of 0 steps"),
    ],
)
def test_what_cannot_work_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        placement_of(name, 0.25, settings)


def test_a_placement_of_ones_own(monkeypatch):
    @dataclass(frozen=True)
    class FirstStep(Placement):
        def choose(self, total, generator):
            return Steps(frozenset({0}), chained=False)

        def graphs(self, total):
            return 1

        def describe(self, total):
            return "the first step"

    monkeypatch.setitem(PLACEMENTS, "first", FirstStep)
    pipeline = tiny_flux()
    weights = add_lora(pipeline)
    rollout = DifferentiableRollout(
        pipeline, height=32, width=32, num_inference_steps=3, placement=placement_of("first"), max_sequence_length=16
    )
    weigh(rollout(PROMPTS, SEEDS).images).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in weights.values())
    with pytest.raises(TypeError, match="`placement` is a str, but must be a `Placement`"):
        DifferentiableRollout(pipeline, placement="last")
