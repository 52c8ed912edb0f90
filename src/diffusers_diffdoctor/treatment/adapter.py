# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The LoRA that a treatment trains: put on the denoiser, written, read back, and loaded by others.

A LoRA is written in one of three forms, whichever the libraries themselves can load for this pipeline:

- `pipe.load_lora_weights(folder)`, where the pipeline has it;
- `pipe.transformer.load_lora_adapter(folder, ...)`, where only the denoiser can load;
- `PeftModel.from_pretrained(pipe.transformer, folder)`, where diffusers knows no LoRA: a folder of PEFT.
"""

import copy
import inspect
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import write_atomically, written_atomically
from ..names import shortened
from .config import TreatmentConfig


LORA_FILE = "pytorch_lora_weights.safetensors"  # the name `pipe.load_lora_weights(folder)` looks for
_PEFT_PREFIX = "base_model.model."  # of every key in a file of PEFT

# How the query, key, value and output projections of attention are called: to_q, to_query, to_qkv, img_qkv_proj, img_attn_qkv,
# to_out.0, out_layer, ... Left out are those of the text's own stream (add_q_proj, to_q_t, txt_...) and of the attention that
# pools the text into one vector (q_proj), which HunyuanDiT reads past an adapter.
_QUERY = r"(to_|img_|img_attn_)(q|query|qkv|qkv_mlp)(_proj)?"
_OTHERS = r"(to_|img_|img_attn_)(k|key|v|value|kv)(_proj)?|(to_out|out_layer|out_proj|img_attn_proj)(\.0)?"


# --- which layers --------------------------------------------------------------------------------------------------------


def attention_projections(denoiser: torch.nn.Module) -> list[str]:
    """Ends of names that pick the query, key, value and output projections of the denoiser's attention, and nothing else.

    An attention module is one with a query projection. An end is as short as it may be: `to_q` where every `to_q` is an
    attention's, `self_attention.out_layer` where other modules have an `out_layer` too.
    """
    modules = dict(denoiser.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    attentions = {name.rpartition(".")[0] for name in layers if re.fullmatch(_QUERY, name.rpartition(".")[2])}
    wanted = set()
    for name in layers:
        owner, _, leaf = name.removesuffix(".0").rpartition(".")
        leaf += ".0" if name.endswith(".0") else ""
        if owner in attentions and re.fullmatch(f"{_QUERY}|{_OTHERS}", leaf):
            wanted.add(name)
    ends = []
    for name in (name for name in layers if name in wanted):
        if not any(_ends(name, end) for end in ends):
            ends.append(_shortest_end(name, modules, wanted))
    return ends


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _shortest_end(name: str, modules: Iterable[str], wanted: set[str]) -> str:
    parts = name.split(".")
    shortest = 2 if parts[-1].isdigit() else 1
    ends = (".".join(parts[-count:]) for count in range(shortest, len(parts) + 1))
    return next(end for end in ends if all(module in wanted for module in modules if _ends(module, end)))


def _check_targets(denoiser: torch.nn.Module, targets: Iterable[str], argument: str) -> None:
    names = [name for name, _ in denoiser.named_modules()]
    missing = sorted(target for target in targets if not any(_ends(name, target) for name in names))
    if missing:
        there = attention_projections(denoiser) or sorted(
            {
                name.rpartition(".")[2]
                for name, module in denoiser.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
        )
        raise ValueError(
            f"`{argument}` has {missing}, but no layer of this {type(denoiser).__name__} is called so. It has {there}; leave "
            "the argument out to take the attention projections."
        )


# --- on the denoiser -----------------------------------------------------------------------------------------------------


def add_lora(
    pipeline: DiffusionPipeline, denoiser_name: str, args: TreatmentConfig, peft_config: PeftConfig | None = None
) -> PeftConfig:
    """Give the denoiser a trainable adapter in float32, and return its configuration: that of `args` without `peft_config`.

    Raises:
        ValueError: there is an adapter already; a named layer does not exist; the adapter changes or trains weights of the
            base, so that "untreated" would not be the base; or the libraries cannot load what would be saved.
    """
    denoiser = getattr(pipeline, denoiser_name)
    present = list(getattr(denoiser, "peft_config", {})) or [
        name for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    if present:
        raise ValueError(
            f"`pipeline` already has the adapters {present[:4]}. Merge them before treatment: pipe.fuse_lora(); "
            "pipe.unload_lora_weights(). Or load the pipeline without them."
        )
    given = peft_config is not None
    peft_config = _lora_config(denoiser, args, peft_config)
    base = dict(denoiser.named_parameters())
    values = {name: plain_values(weight) for name, weight in base.items()} if given else {}
    try:
        if hasattr(denoiser, "add_adapter"):
            denoiser.add_adapter(peft_config)
        else:
            inject_adapter_in_model(peft_config, denoiser)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`peft_config` does not suit this {type(denoiser).__name__}: {error}") from error
    cast_training_params(denoiser, dtype=torch.float32)  # half precision would swallow small updates
    if given:
        _check_base_is_untouched(denoiser, base, values)
        _check_loadable(pipeline, denoiser_name)
    return peft_config


def _lora_config(denoiser: torch.nn.Module, args: TreatmentConfig, peft_config: PeftConfig | None) -> PeftConfig:
    argument = "lora_target_modules" if peft_config is None else "peft_config.target_modules"
    targets = args.lora_target_modules if peft_config is None else getattr(peft_config, "target_modules", None)
    if targets is None:
        targets = attention_projections(denoiser)
        if not targets:
            _check_targets(denoiser, ["to_q"], argument)
    elif not isinstance(targets, str):  # a text is a pattern of PEFT's, which PEFT checks
        _check_targets(denoiser, targets, argument)
    if peft_config is not None:
        peft_config = copy.deepcopy(peft_config)
        peft_config.target_modules = targets if isinstance(targets, str) else set(targets)
        return peft_config
    return LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, target_modules=list(targets)
    )


def plain_values(weight: torch.Tensor, count: int = 64) -> list[torch.Tensor]:
    """At most `count` values, evenly spaced, of each plain tensor a weight is made of: one, or the parts of a quantized one."""
    if weight.device.type == "meta":
        return []
    if hasattr(weight, "__tensor_flatten__"):
        return [
            value for part in weight.__tensor_flatten__()[0] for value in plain_values(getattr(weight, part), count)
        ]
    return [weight.detach().flatten()[:: max(1, math.ceil(weight.numel() / count))].clone()]


def _check_base_is_untouched(
    denoiser: torch.nn.Module, base: dict[str, torch.nn.Parameter], before: dict[str, list[torch.Tensor]]
) -> None:
    """Switched off, an adapter must leave the base as it was, and only its own layers can be switched off."""
    for name, weight in base.items():
        if weight.requires_grad:
            raise ValueError(
                f"`peft_config` trains weights of the base, such as {name!r}: without its adapter the pipeline would not be "
                'the untreated one. Use bias="none".'
            )
        if not all(map(torch.equal, before[name], plain_values(weight))):
            raise ValueError(
                f"`peft_config` changes weights of the base when it is added, such as {name!r}: without its adapter the "
                "pipeline would not be the untreated one, and on a plain pipeline the saved LoRA would draw other images. "
                'Use init_lora_weights=True or "gaussian".'
            )
    layers = [name for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, weight in denoiser.named_parameters():
        if weight.requires_grad and not any(name.startswith(f"{layer}.") for layer in layers):
            raise ValueError(
                f"`peft_config` trains whole modules, such as that of {name!r}, which cannot be switched off with the adapter. "
                "Leave out `modules_to_save`, and name the modules in `target_modules`."
            )


def _check_loadable(pipeline: DiffusionPipeline, denoiser_name: str) -> None:
    """Save, load with the libraries' own loader into a twin of the denoiser that has no weights, and compare."""
    denoiser = getattr(pipeline, denoiser_name)
    with init_empty_weights():
        twin = type(denoiser).from_config(denoiser.config)
    plain = copy.copy(pipeline)
    plain._internal_dict = dict(pipeline._internal_dict)
    plain.__dict__[denoiser_name] = twin
    remedy = "Use a plain LoraConfig(r=..., lora_alpha=..., target_modules=[...])."
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_lora(pipeline, denoiser_name, folder)
            load_saved_lora(plain, denoiser_name, folder)
        except Exception as error:  # whatever a library raises for a configuration that it does not know
            raise ValueError(
                f"`peft_config` makes an adapter that cannot be saved and loaded again: {error} {remedy}"
            ) from error
    saved, loaded = _layout(denoiser), _layout(twin)
    differing = sorted(name for name in saved.keys() | loaded.keys() if saved.get(name) != loaded.get(name))
    if differing:
        raise ValueError(
            f"`peft_config` makes an adapter that {loading_call(pipeline, denoiser_name, 'folder')} does not restore: "
            f"{len(differing)} of its parts differ, the first is {differing[0]}. {remedy}"
        )


def load_saved_lora(pipeline: DiffusionPipeline, denoiser_name: str, folder: str) -> None:
    """What [`loading_call`] says: the LoRA of a folder upon a plain pipeline, its weights on "meta" or not."""
    form, denoiser = _form(pipeline, denoiser_name), getattr(pipeline, denoiser_name)
    if form == "pipeline":
        pipeline.load_lora_weights(folder, low_cpu_mem_usage=True)
    elif form == "denoiser":
        denoiser.load_lora_adapter(folder, prefix=None, weight_name=LORA_FILE, low_cpu_mem_usage=True)
    else:
        PeftModel.from_pretrained(denoiser, folder, low_cpu_mem_usage=True)


def _layout(denoiser: torch.nn.Module) -> dict[str, Any]:
    """All that decides what an adapter's weights do: their names and shapes, and the scale of each layer."""
    (name,) = denoiser.peft_config
    layout = {key: _shape(value) for key, value in get_peft_model_state_dict(denoiser, adapter_name=name).items()}
    for layer, module in denoiser.named_modules():
        if isinstance(module, BaseTunerLayer):
            layout[f"{layer}.scale"] = getattr(module, "scaling", {}).get(name)
    return layout


# --- beneath it ------------------------------------------------------------------------------------------------------------


def merge_lora(pipeline: DiffusionPipeline, lora: str, scale: float = 1.0) -> None:
    """Make a LoRA of somebody's a part of the pipeline: what is treated then, and what its treatment is loaded upon.

    Args:
        pipeline: without adapters.
        lora: its folder, file or id on the Hub, as `load_lora_weights` takes it.
        scale: with which it is merged.

    Raises:
        ValueError: the pipeline loads none, or not this one.
    """
    name = type(pipeline).__name__
    if not (hasattr(pipeline, "load_lora_weights") and hasattr(pipeline, "fuse_lora")):
        raise ValueError(
            f"`base_lora` is {lora!r}, but a {name} loads no LoRA itself. Merge it into the denoiser, save the pipeline, and treat "
            "that: `PeftModel.from_pretrained(...).merge_and_unload()`."
        )
    path = Path(lora)
    source = {"weight_name": path.name} if path.is_file() else {}
    try:
        pipeline.load_lora_weights(str(path.parent if path.is_file() else lora), **source)
    except Exception as error:  # whatever a library raises for files that are others
        raise ValueError(f"`base_lora` is {lora!r}, which this {name} cannot load: {error}") from error
    if not pipeline.get_active_adapters():
        raise ValueError(
            f"`base_lora` is {lora!r}, in which this {name} finds no weights of its own. Was it trained for it?"
        )
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()


def merging_lines(lora: str, scale: float) -> list[str]:
    """The lines of Python that do what [`merge_lora`] did, upon a plain pipeline called `pipe`."""
    return [
        f"pipe.load_lora_weights({json.dumps(str(lora), ensure_ascii=False)})  # what was treated wears it",
        f"pipe.fuse_lora(lora_scale={scale:g})",
        "pipe.unload_lora_weights()",
    ]


# --- on disk -------------------------------------------------------------------------------------------------------------


def _form(pipeline: DiffusionPipeline, denoiser_name: str) -> str:
    if not hasattr(getattr(pipeline, denoiser_name), "load_lora_adapter"):
        return "peft"  # whatever the pipeline inherits: Kandinsky 3 has a loader that its UNet lacks the other half of
    saver = getattr(pipeline, "save_lora_weights", None)
    layers = f"{denoiser_name}_lora_layers"
    return "pipeline" if saver is not None and layers in inspect.signature(saver).parameters else "denoiser"


def save_lora(
    pipeline: DiffusionPipeline, denoiser_name: str, folder: str | os.PathLike, weight_name: str | None = None
) -> None:
    """Write the denoiser's adapter so that what [`loading_lines`] says restores it, rank and alpha included.

    `weight_name` is another name for the file of weights, which then only [`load_lora`] finds.
    """
    form, denoiser = _form(pipeline, denoiser_name), getattr(pipeline, denoiser_name)
    config = denoiser.peft_config["default"]
    weights = {name: value.detach().cpu().contiguous() for name, value in get_peft_model_state_dict(denoiser).items()}
    metadata = {
        # sets have no order, so the same adapter would be described otherwise in another process
        key: sorted(value) if isinstance(value, set) else value
        for key, value in shortened(config.to_dict()).items()
    }
    # diffusers loads an adapter in training mode, where dropout would spoil its images
    metadata["lora_dropout"] = 0.0
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(metadata, indent=2, sort_keys=True, default=str)
    file = Path(folder, weight_name or (SAFETENSORS_WEIGHTS_NAME if form == "peft" else LORA_FILE))
    with written_atomically(file) as unfinished:
        if form == "pipeline":
            layers = {f"{denoiser_name}_lora_layers": weights, f"{denoiser_name}_lora_adapter_metadata": metadata}
            pipeline.save_lora_weights(unfinished.parent, weight_name=unfinished.name, **layers)
        elif form == "denoiser":
            save_file(weights, unfinished, metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: text})
        else:
            weights = {_PEFT_PREFIX + name: value for name, value in weights.items()}
            save_file(weights, unfinished, metadata={"format": "pt"})
    if form == "peft":
        write_atomically(Path(folder, CONFIG_NAME), text + "\n")


def lora_files(folder: str | os.PathLike) -> list[Path]:
    """The files that are the LoRA of a folder, its weights first; none if the folder has no LoRA."""
    diffusers_file = Path(folder, LORA_FILE)
    peft_files = [Path(folder, SAFETENSORS_WEIGHTS_NAME), Path(folder, CONFIG_NAME)]
    for files in ([diffusers_file], peft_files):
        if all(file.is_file() for file in files):
            return files
    return []


def load_lora(denoiser: torch.nn.Module, denoiser_name: str, path: str | os.PathLike) -> None:
    """Put weights written by [`save_lora`] into the adapter the denoiser already has.

    Args:
        denoiser: the module with the adapter.
        denoiser_name: what the pipeline calls it.
        path: the folder, or a file of weights.

    Raises:
        ValueError: there is no LoRA, or the adapters have other layers or another rank.
    """
    files = lora_files(path) if Path(path).is_dir() else [Path(path)]
    if not files:
        raise ValueError(f"{str(path)!r} has no LoRA: neither {LORA_FILE} nor {SAFETENSORS_WEIGHTS_NAME}.")
    try:
        weights = load_file(files[0])
    except SafetensorError as error:
        raise ValueError(
            f"{str(files[0])!r} is no whole file of safetensors: {error}. Take another checkpoint."
        ) from error
    found = {
        name.removeprefix(f"{denoiser_name}.").removeprefix(_PEFT_PREFIX): value for name, value in weights.items()
    }
    expected = get_peft_model_state_dict(denoiser)
    differing = [
        f"{name}: {_shape(found.get(name))} in the file, {_shape(expected.get(name))} here"
        for name in sorted(found.keys() | expected.keys())
        if _shape(found.get(name)) != _shape(expected.get(name))
    ]
    if differing:
        raise ValueError(
            f"The LoRA of {str(path)!r} does not fit this trainer's: {len(differing)} weights differ, the first is "
            f"{differing[0]}. Use the `peft_config` (or `lora_rank` and `lora_target_modules`) and the pipeline it was "
            "trained with."
        )
    set_peft_model_state_dict(denoiser, found)


def _shape(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else "x".join(map(str, tensor.shape))


# --- for others ----------------------------------------------------------------------------------------------------------


def loading_call(pipeline: DiffusionPipeline, denoiser_name: str, lora: str) -> str:
    """The call that loads the LoRA of a folder or a repository of the Hub into a plain pipeline called `pipe`."""
    form, lora = _form(pipeline, denoiser_name), json.dumps(str(lora), ensure_ascii=False)
    if form == "pipeline":
        return f"pipe.load_lora_weights({lora})"
    if form == "denoiser":
        return f'pipe.{denoiser_name}.load_lora_adapter({lora}, prefix=None, weight_name="{LORA_FILE}")'
    return f"PeftModel.from_pretrained(pipe.{denoiser_name}, {lora})"


def scaling_call(pipeline: DiffusionPipeline, denoiser_name: str, scale: float) -> str:
    """The call that, after [`loading_call`], makes the LoRA weaker (`scale` below 1) or stronger."""
    form = _form(pipeline, denoiser_name)
    if form == "pipeline":
        return f"pipe.set_adapters(pipe.get_active_adapters(), {scale})"
    if form == "denoiser":
        return f"pipe.{denoiser_name}.set_adapters(pipe.{denoiser_name}.active_adapters(), {scale})"
    return f'[m.scale_layer({scale}) for m in pipe.{denoiser_name}.modules() if hasattr(m, "scale_layer")]'


def loading_lines(
    pipeline: DiffusionPipeline,
    denoiser_name: str,
    *,
    base: str,
    lora: str,
    dtype: torch.dtype = torch.bfloat16,
    scale: float | None = None,
    base_lora: str | None = None,
    base_lora_scale: float = 1.0,
) -> str:
    """The lines of Python that load the base and a LoRA saved by [`save_lora`], without this package.

    Args:
        pipeline: the treated pipeline; its class and its denoiser's decide which of the three forms it is.
        denoiser_name: what it calls its denoiser.
        base: id or folder of the untreated pipeline.
        lora: folder of the LoRA, or its repository on the Hub.
        dtype: the type to load the pipeline in. Without one, parts stored in different types would not fit together.
        scale: strength of the LoRA; as it was trained without it.
        base_lora, base_lora_scale: the LoRA that was merged into the base before its treatment.
    """
    call = loading_call(pipeline, denoiser_name, lora)
    scaling = [scaling_call(pipeline, denoiser_name, scale)] if scale is not None else []
    lines = ["import torch", "from diffusers import DiffusionPipeline"]
    lines += ["from peft import PeftModel"] if call.startswith("PeftModel") else []
    base = json.dumps(str(base), ensure_ascii=False)
    # `torch_dtype` is the name that every supported version of diffusers understands
    lines += ["", f"pipe = DiffusionPipeline.from_pretrained({base}, torch_dtype={dtype})"]
    lines += merging_lines(base_lora, base_lora_scale) if base_lora is not None else []
    return "\n".join([*lines, call, *scaling])
