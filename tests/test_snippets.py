# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The Python of README and docs runs as it stands, page by page, in a folder that has what the page speaks of.

Only what would need a network, a GPU or hours is another: see `STANDS_FOR`. `hub.md` is left to `test_hub.py`, which has a Hub.
"""

import json
import re
import textwrap
from pathlib import Path

import pytest
import torch
from fixtures.pipelines import tiny_flux
from fixtures.rows import photo_bytes, write_rows
from fixtures.scorers import write_hpsv2
from fixtures.trainer import HELD_OUT, PROMPTS, photos, rows, tiny_detector, tiny_trainer
from PIL import Image

from diffusers_diffdoctor import PixelRewardConfig
from diffusers_diffdoctor.data import Label, find_shards, run_stage


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/source").glob("*.md"))]
ELSEWHERE = {"hub"}

# what a page says -> what stands for it
STANDS_FOR = {
    "black-forest-labs/FLUX.1-schnell": "flux",
    "https://example.com/image.jpg": "large.png",
    '.to("cuda")': '.to("cpu")',
    "trainer.push_to_hub()": "trainer.save_model()",
    # sizes of FLUX.1
    "height=512": "height=32",
    "width=512": "width=32",
    "height=1024": "height=32",
    "width=1024": "width=32",
    "resolution=512": "resolution=32",
    # hours
    'PixelRewardConfig(output_dir="flux-treated"': 'PixelRewardConfig(output_dir="flux-treated", **SMALL',
    'DDPOConfig(output_dir="brighter"': 'DDPOConfig(output_dir="brighter", **SMALL',
    "num_images_per_prompt=4": 'num_images_per_prompt=1, advantages="rollout"',  # the rollout is of one image
    'DiffusionDPOConfig(output_dir="preferred"': 'DiffusionDPOConfig(output_dir="preferred", **SMALL',
    'output_dir="detector", ': 'output_dir="trained", use_cpu=True, max_steps=1, report_to="none", ',
    '"OpenGVLab/pvt_v2_b2"': '"detector"',
    # the Hub
    '"hpsv2"': '"hpsv2=hpsv2"',
    'parts["hpsv2=hpsv2"]': 'parts["hpsv2"]',
    # a cluster
    "SlurmPipelineExecutor": "LocalPipelineExecutor",
    'time="02:00:00", partition="gpu", ': "",
}
SMALL = {
    "use_cpu": True,
    "max_steps": 1,
    "per_device_train_batch_size": 1,
    "max_sequence_length": 16,
    "eval_num_images": 1,
    "log_images": 0,
    "overwrite_output_dir": True,  # a folder is shared by all pages
    "report_to": "none",
}


def blocks(page: Path) -> list[str]:
    return [textwrap.dedent(code) for code in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    tiny_detector().save_pretrained(folder / "detector")
    tiny_flux().save_pretrained(folder / "flux")
    write_hpsv2(folder / "hpsv2")
    for name, size in (("image", (64, 48)), ("large", (640, 560))):
        Image.linear_gradient("L").resize(size).convert("RGB").save(folder / f"{name}.png")
    (folder / "prompts.csv").write_text("prompt\n" + "\n".join(PROMPTS) + "\n")
    (folder / "held_out_prompts.csv").write_text("prompt\n" + "\n".join(HELD_OUT) + "\n")
    for part in range(2):
        pool = [{"image": photo_bytes(i), "category": "hand"} for i in range(4 * part, 4 * part + 4)]
        write_rows(folder / f"pool/data/train-{part:05d}-of-00002.parquet", pool)
    label = Label.by(str(folder / "detector"), precision="bfloat16")
    run_stage(label, find_shards(folder / "pool"), folder / "labelled", show_progress=False)
    (folder / "photos").mkdir()
    with open(folder / "photos/metadata.jsonl", "w") as file:
        for i, row in enumerate(photos(3, size=40)):
            row["image"].save(folder / f"photos/{i}.png")
            file.write(json.dumps({"file_name": f"{i}.png", "prompt": row["prompt"]}) + "\n")
    boxes = {f"{i}.png": [4, 4, 20 + i, 20] for i in range(3)}
    (folder / "photos/boxes.json").write_text(json.dumps(boxes))
    annotations = {"categories": [{"id": 1, "name": "hand"}], "images": [], "annotations": []}
    for i, (x1, y1, x2, y2) in enumerate(boxes.values()):
        annotations["images"].append({"id": i, "file_name": f"{i}.png", "width": 40, "height": 40})
        annotations["annotations"].append({"image_id": i, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    (folder / "annotations.json").write_text(json.dumps(annotations))
    return folder


def given(page: str, folder: Path) -> dict:
    """What the page calls by a name without saying where it comes from."""
    names = {"SMALL": SMALL, "PixelRewardConfig": PixelRewardConfig, "detector": tiny_detector()}
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    if page == "README":
        names |= {"prompts": rows(PROMPTS), "held_out_prompts": rows(HELD_OUT), "photos": photos()}
    if page == "detector":
        names |= {"images": images}
    if page == "train_detector":
        clean, broken = Image.new("L", (40, 40), 0), Image.linear_gradient("L").resize((40, 40))
        shown = [
            {"image": row["image"].crop((0, 0, 40, 40)), "artifact_map": artifact_map}
            for row, artifact_map in zip(photos(4, size=40), [clean, broken] * 2)
        ]
        names |= {"annotated": shown, "photos": shown[::2], "held_out": shown}
    if page == "evaluation":
        names |= {
            "before": images,
            "after": 1 - images,
            "prompts": PROMPTS[:2] * 2,
            "seeds": [0, 1, 2, 3],
            "categories": ["hand", "face"] * 2,
            "judge": tiny_detector(1),
            "clip_score": lambda images, prompts: images.mean(dim=(1, 2, 3)),
            "image_features": lambda images: images.flatten(1),
            "trainer": tiny_trainer(folder / "evaluated"),
        }
    if page == "detector_metrics":
        groups = {"category": [["hand"], []] * 2, "generator": ["flux"] * 4, "source": ["photo", "human"] * 2}
        names |= {"batches": [{"images": images, "maps": (images[:, :1] > 0.5).float(), **groups}]}
    return names


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page.stem not in ELSEWHERE], ids=lambda page: page.stem
)
def test_snippets_run(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = given(page.stem, folder)
    for code in blocks(page):
        for said, instead in STANDS_FOR.items():
            code = code.replace(said, instead)
        exec(compile(code, page.name, "exec"), names)
