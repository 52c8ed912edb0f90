# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor score`, and the names of rewards in `diffdoctor treat`."""

import csv
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from fixtures import scorers
from fixtures.trainer import tiny_detector
from PIL import Image

from diffdoctor import main
from diffusers_diffdoctor import miniature
from diffusers_diffdoctor.cli.treat import ScriptArguments, read_inputs
from diffusers_diffdoctor.images import to_image_tensor
from diffusers_diffdoctor.rewards import CLIPReward, HPSv2Reward


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four images of two sizes, one broken file, what they show, a scorer and a detector."""
    folder = tmp_path_factory.mktemp("score")
    (folder / "images").mkdir()
    noise = np.random.default_rng(0)
    rows = []
    for i, size in enumerate([(40, 40), (40, 40), (56, 40), (40, 40)]):
        Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"images/{i}.png")
        rows.append({"file_name": f"{i}.png", "prompt": "red cat and dog"[: 3 + 4 * i]})
    (folder / "images/broken.png").write_bytes(b"no image")
    rows.append({"file_name": "broken.png", "prompt": "x"})
    (folder / "images/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    scorers.write_hpsv2(folder / "hps")
    tiny_detector().save_pretrained(folder / "detector")
    return folder


def expected(folder, prompts):
    reward = HPSv2Reward.from_pretrained(folder / "hps")
    with torch.no_grad():
        return [
            reward(to_image_tensor(folder / f"images/{i}.png")[None], [prompt]).item()
            for i, prompt in enumerate(prompts)
        ]


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_the_table_has_every_image(folder, tmp_path, capsys, suffix):
    output = tmp_path / f"new/scores{suffix}"
    argv = ["score", f"{folder}/images", "--reward", f"hpsv2={folder}/hps", "detector", "--batch-size", "2"]
    argv += ["--detector", f"{folder}/detector", "--prompts", f"{folder}/images/metadata.jsonl", "--device", "cpu"]
    assert main([*argv, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "6 found = 4 scored + 1 quarantined + 1 skipped" in printed and "broken.png" in printed
    if suffix == ".csv":
        rows = list(csv.DictReader(output.open()))
    else:
        written = json.loads(output.read_text())
        rows = written["images"]
        assert [row["path"] for row in written["quarantined"]] == [f"{folder}/images/broken.png"]
        assert written["means"]["hpsv2"] == pytest.approx(sum(row["hpsv2"] for row in rows) / 4)
    scores = [float(row["hpsv2"]) for row in rows]
    assert scores == sorted(scores, reverse=True), "the best first"
    rows.sort(key=lambda row: row["path"])
    right = expected(folder, ["red", "red cat", "red cat and", "red cat and dog"])
    assert [float(row["hpsv2"]) for row in rows] == pytest.approx(right, abs=1e-5)
    detector = tiny_detector().eval()
    for i, row in enumerate(rows):
        with torch.no_grad():
            highest = detector.confidence(to_image_tensor(folder / f"images/{i}.png")[None]).amax().item()
        assert float(row["artifact"]) == pytest.approx(1 - highest, abs=1e-5)
    assert all(f"{score:.4f}" in printed for score in scores)


def test_one_prompt_for_all_and_prompts_in_order(folder, tmp_path, capsys):
    images = [f"{folder}/images/{i}.png" for i in range(4)]
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\n")
    for asked, prompts in ((["--prompt", "a"], "aaaa"), (["--prompts", f"{tmp_path}/p.txt"], "abcd")):
        output = tmp_path / "s.csv"
        assert main(["score", *images, "--reward", f"hpsv2={folder}/hps", *asked, "-o", str(output)]) == 0
        rows = sorted(csv.DictReader(output.open()), key=lambda row: row["path"])
        assert [float(row["hpsv2"]) for row in rows] == pytest.approx(expected(folder, prompts), abs=1e-5)
    capsys.readouterr()


def test_a_server_scores_and_its_wrong_answers_are_counted(folder, capsys):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            count = len(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["images"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"scores": [0.25] * count if count == 1 else []}).encode())

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{httpd.server_address[1]}"
        assert main(["score", f"{folder}/images/0.png", f"{folder}/images/1.png", "--reward", url]) == 0
    finally:
        httpd.shutdown()
        httpd.server_close()
    printed = capsys.readouterr().out
    assert printed.count("0.2500") == 3 and "2 found = 2 scored" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--reward hspv2", "`--reward`: There is no reward 'hspv2', did you mean 'hpsv2'"),
        ("--reward detector", "`--reward detector` needs a `--detector`"),
        ("--reward hpsv2={folder}/hps", "compare images with prompts: say what they show by `--prompt`"),
        ("--reward hpsv2={folder}/images --prompt a", "has no HPS_v2.1_compressed.pt"),
        ("--reward hpsv2={folder}/hps --prompts {folder}/none.txt", "`--prompts`: there is no file"),
        ("--reward clip --prompt a --output x.txt", "must end in one of .csv, .json"),
        ("--reward clip --prompt a --batch-size 0", "`--batch-size` must be at least 1"),
        ("--reward clip --prompt a --device nonsense", "`--device nonsense` cannot be used here"),
    ],
)
def test_wrong_use_is_a_line(folder, argv, message, capsys):
    assert main(["score", f"{folder}/images", *argv.format(folder=folder).split()]) == 1
    assert message in capsys.readouterr().err


def test_images_without_a_prompt_are_said_first(folder, tmp_path, capsys):
    (tmp_path / "m.csv").write_text(f"file_name,prompt\n{folder}/images/0.png,a\n")
    (tmp_path / "p.txt").write_text("a\nb\n")
    for file, message in (("m.csv", "no prompt for 4 of 5 images"), ("p.txt", "2 prompts for 5 images")):
        assert main(["score", f"{folder}/images", "--reward", "clip", "--prompts", f"{tmp_path}/{file}"]) == 1
        assert message in capsys.readouterr().err


def test_nothing_scored_is_status_1(folder, capsys):
    assert main(["score", f"{folder}/images/broken.png", "--reward", f"hpsv2={folder}/hps", "--prompt", "a"]) == 1
    assert "1 found = 0 scored + 1 quarantined" in capsys.readouterr().out


# --- treat -------------------------------------------------------------------------------------------------------------------


def test_treat_takes_rewards_by_name(folder, monkeypatch, capsys):
    monkeypatch.setattr(miniature, "regularization_dataset", partial(miniature.regularization_dataset, 2))
    rewards = [f"hpsv2={folder}/hps", "clip", "detector"]
    inputs = read_inputs(ScriptArguments(pipeline="miniature", reward=rewards))
    assert isinstance(inputs.rewards[0], HPSv2Reward) and isinstance(inputs.rewards[1], CLIPReward)
    assert inputs.rewards[2] is inputs.detector
    with pytest.raises(ValueError, match="`--reward`: There is no reward 'hspv2'"):
        ScriptArguments(reward=["hspv2"])
    (folder / "out").mkdir(exist_ok=True)
    with pytest.raises(SystemExit, match="`--reward_weights` has 1 entries for the 2 of `--reward`"):
        main(f"treat --pipeline miniature --output_dir {folder}/out --reward clip detector --reward_weights 1".split())
    with pytest.raises(SystemExit, match="`--detector` is missing"):  # that the report needs
        main(f"treat --output_dir {folder}/out --reward clip".split())


@pytest.mark.slow
def test_the_detector_guards_an_image_level_reward(tmp_path, monkeypatch, capsys):
    """arXiv 2601.03468, by arguments alone."""
    monkeypatch.setattr(miniature, "regularization_dataset", partial(miniature.regularization_dataset, 4))
    argv = (
        f"treat --pipeline miniature --output_dir {tmp_path} --max_steps 1 --use_cpu --num_inference_steps 2".split()
    )
    argv += (
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 1 --report_images 0 --eval_strategy no".split()
    )
    argv += "--reward clip detector --reward_weights 0.01 1 --logging_steps 1".split()
    assert main(argv) == 0
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"rewards/clip", "rewards/artifact", "loss/pixel"} <= set(logged[0])
    assert "0.01 x clip, 1 x artifact" in (tmp_path / "README.md").read_text()
