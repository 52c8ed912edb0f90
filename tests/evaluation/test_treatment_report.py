# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""What a treatment did, against figures worked out by hand; and the report that shows them."""

import csv
import io
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_diffdoctor.evaluation import ImagePairs, TreatmentRun, draw_pairs, measure, print_summary, render


class BrightnessJudge:
    """Calls bright red ill: the confidence of a pixel is its red channel times `scale`."""

    def __init__(self, scale):
        self.scale, self.batches = scale, []

    def confidence(self, images):
        self.batches.append(len(images))
        return self.scale * images[:, :1]


# Reddest pixel of each of six images; everything else is 0.2 gray.
BEFORE = [0.9, 0.8, 0.7, 0.6, 0.3, 0.5]
AFTER = [0.1, 0.55, 0.3, 0.2, 0.6, 0.2]
PROMPTS = ["a hand", "a hand", "a face", "a face", "a dog", "a dog"]
CATEGORIES = ["hand", "hand", "face", "face", "dog", "dog"]
LOG = [{"step": step, "loss": 1 / step} for step in range(1, 9)]


LOADING_CODE = 'pipe = DiffusionPipeline.from_pretrained("runs/base")\npipe.load_lora_weights("runs/lora")'
RATES = {"misses": 0.03, "false_alarms": 0.02, "scenes": 2000, "misses_by_kind": {"extra": 0.01, "fused": None}}


def images(reds):
    result = torch.full((len(reds), 3, 16, 16), 0.2)
    result[:, 0, 8, 8] = torch.tensor(reds)
    return result


def features(images):
    return torch.stack([images[:, 0, 8, 8], images[:, 1, 8, 8]], dim=1)


def fidelity(images, prompts):
    return torch.tensor([100 * float(image[0, 8, 8]) + len(prompt) for image, prompt in zip(images, prompts)])


PAIRS = ImagePairs(images(BEFORE), images(AFTER), PROMPTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    judges = {"judge": BrightnessJudge(1.0), "detector": BrightnessJudge(0.8)}
    pairs = ImagePairs(images(BEFORE), images(AFTER), PROMPTS, range(10, 16), CATEGORIES)
    figures = measure(
        pairs, judges, fidelity=fidelity, features={"colour": features}, batch_size=4, show_progress=False
    )
    assert judges["judge"].batches == [4, 2, 4, 2]
    run = TreatmentRun(
        "runs/lora", "runs/base", LOADING_CODE, RATES, LOG, {"rank": torch.tensor(16), "nothing": math.nan}
    )
    report = render(figures, draw_pairs(pairs, judges["judge"]), folder, run)
    assert {name: report[name] for name in figures} == figures
    return report, folder


def report_of(pairs, folder, **arguments):
    judge = BrightnessJudge(1.0)
    figures = measure(pairs, {"judge": judge}, show_progress=False, **arguments)
    return render(figures, draw_pairs(pairs, judge), folder)


def test_frequencies(made):
    frequency = made[0]["artifact_frequency"]
    # >= 0.5: 0.9 0.8 0.7 0.6 0.5 before; 0.55 0.6 after
    assert frequency["judge"]["before"] == pytest.approx(5 / 6)
    assert frequency["judge"]["after"] == pytest.approx(2 / 6)
    assert (frequency["judge"]["healed"], frequency["judge"]["harmed"]) == (4, 1)
    # times 0.8: 0.72 0.64 0.56 before; none after
    assert frequency["detector"]["before"] == pytest.approx(3 / 6)
    assert frequency["detector"]["after"] == 0
    low, high = frequency["judge"]["before_interval"]
    assert low < 5 / 6 < high < 1
    assert frequency["detector"]["after_interval"][0] == 0


def test_categories(made):
    table = made[0]["categories"]
    assert list(table) == ["dog", "face", "hand"]
    rates = {
        name: (row["judge"]["before"], row["judge"]["after"], row["judge"]["images"]) for name, row in table.items()
    }
    assert rates == {"dog": (0.5, 0.5, 2), "face": (1.0, 0.0, 2), "hand": (1.0, 0.5, 2)}


def test_fidelity_is_paired(made):
    result = made[0]["fidelity"]
    lengths = sum(map(len, PROMPTS)) / 6
    assert result["before"] == pytest.approx(100 * sum(BEFORE) / 6 + lengths, rel=1e-5)
    assert result["after"] == pytest.approx(100 * sum(AFTER) / 6 + lengths, rel=1e-5)
    differences = [100 * (new - old) for old, new in zip(BEFORE, AFTER)]
    mean = sum(differences) / 6
    spread = math.sqrt(sum((x - mean) ** 2 for x in differences) / 5 / 6)
    assert result["difference_interval"] == pytest.approx(
        [mean - 1.959964 * spread, mean + 1.959964 * spread], rel=1e-4
    )


def test_diversity_is_within_prompts(made):
    for side, reds in (("before", BEFORE), ("after", AFTER)):
        wanted = sum(abs(reds[i] - reds[i + 1]) for i in (0, 2, 4)) / 3  # the second feature is the same everywhere
        assert made[0]["diversity"][side] == pytest.approx(wanted, rel=1e-4)
    assert made[0]["diversity_by"] == {"colour": made[0]["diversity"]}


def test_the_first_of_several_diversities_counts(tmp_path):
    pairs = ImagePairs(images([0.9, 0.1]), images([0.5, 0.3]), ["a hand", "a hand"])
    both = {"colour": features, "nothing": lambda x: torch.zeros(len(x), 2)}
    report = report_of(pairs, tmp_path, features=both)
    assert report["diversity"] == report["diversity_by"]["colour"]
    assert report["diversity"]["before"] == pytest.approx(0.8) and report["diversity"]["after"] == pytest.approx(0.2)
    assert report["diversity_by"]["nothing"] == {"before": 0, "after": 0}
    out = io.StringIO()
    print_summary(report, file=out)
    assert "diversity, colour" in out.getvalue() and "diversity, nothing" in out.getvalue()
    assert "diversity, nothing" in (tmp_path / "report.html").read_text()


def test_change_is_around_what_the_first_judge_saw(made):
    # The gray 0.2 is above the 0.1 of the pixel loss, so everything is inside.
    change = made[0]["change"]
    assert change["outside"] is None
    assert change["inside"] == pytest.approx(
        sum(abs(new - old) for old, new in zip(BEFORE, AFTER)) / 3 / 256 / 6, rel=1e-4
    )
    assert change["region_of"] == "judge"


def test_change_is_around_the_diagnosis_before_the_treatment_by_the_judge_that_counts():
    before, after = torch.zeros(2, 1, 3, 16, 16)
    before[0, 0, 2, 2], after[0, 0, 12, 12] = 0.9, 0.6
    judges = {"judge": BrightnessJudge(1.0), "blind": BrightnessJudge(0.0)}
    change = measure(ImagePairs(before, after, ["a hand"]), judges, show_progress=False)["change"]
    assert change["inside"] == pytest.approx(0.3 / 9)  # the pixel and its neighbours
    assert change["outside"] == pytest.approx(0.2 / (256 - 9))


def test_the_threshold_is_that_of_frequency_and_area():
    figures = measure(PAIRS, {"judge": BrightnessJudge(1.0)}, threshold=0.65, show_progress=False)
    assert figures["artifact_frequency"]["judge"]["before"] == pytest.approx(3 / 6)
    assert figures["area_ratio"]["judge"] == {"before": pytest.approx(3 / 6 / 256), "after": 0}
    assert figures["thresholds"] == {"artifact": 0.65, "change": 0.1}


def test_files(made):
    report, folder = made
    written = ["curves.png", "report.csv", "report.html", "report.json", "report.png", "report_files"]
    assert sorted(file.name for file in folder.iterdir()) == written
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == report
    assert report["counts"] == {"images": 6, "prompts": 3, "diversity_images": 6, "height": 16, "width": 16}
    assert report["judge_error_rates"] == RATES
    assert report["details"] == {"rank": 16, "nothing": None}
    assert report["images"][4] == {
        "prompt": "a dog",
        "seed": 14,
        "category": "dog",
        "judge": {"before": pytest.approx(0.3), "after": pytest.approx(0.6), "harm": pytest.approx(0.3 / 256)},
        "detector": {"before": pytest.approx(0.24), "after": pytest.approx(0.48), "harm": pytest.approx(0.24 / 256)},
    }
    assert report["training_log"] == LOG
    assert Image.open(folder / "report.png").width > 4 * 192
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert (
        "83.3 % → 33.3 %" in html and "Prompt fidelity" in html and "load_lora_weights" in html and "runs/lora" in html
    )
    assert html.count("data:image/") == 1 and "http" not in html.replace("http-equiv", "")


def test_each_pair_is_shown_the_worst_after_the_treatment_first(made):
    _, folder = made
    html = (folder / "report.html").read_text(encoding="utf-8")
    # after: 0.1 0.55 0.3 0.2 0.6 0.2; of the two of 0.2, the face was healed more than the dog
    assert [int(seed) for seed in re.findall(r"seed (\d+), confidence", html)] == [14, 11, 12, 15, 13, 10]
    verdicts = re.findall(r'data-verdict="([^"]+)" data-category="(\w+)"', html)
    assert verdicts == [
        ("harmed", "dog"),
        ("both wrong", "hand"),
        *[("healed", category) for category in ("face", "dog", "face", "hand")],
    ]
    assert "confidence 0.30 → 0.60, harm +0.0012" in html
    names = re.findall(r'<img src="(report_files/\w+\.webp)" width="16" height="16"', html)
    assert len(names) == 4 * 6 and {folder / name for name in names} == set((folder / "report_files").iterdir())
    before, after, _, _ = (np.asarray(Image.open(folder / name).convert("RGB")) for name in names[:4])
    assert (before[8, 8, 0], after[8, 8, 0]) == (round(0.3 * 255), round(0.6 * 255))


def test_the_table_of_images_is_written_for_spreadsheets_too(made):
    report, folder = made
    with open(folder / "report.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["prompt"] for row in table] == PROMPTS and [row["seed"] for row in table] == list(
        "10 11 12 13 14 15".split()
    )
    assert [row["verdict"] for row in table] == ["healed", "both wrong", "healed", "healed", "harmed", "healed"]
    for row, told in zip(table, report["images"]):
        for judge in ("judge", "detector"):
            assert {key: float(row[f"{judge}_{key}"]) for key in ("before", "after", "harm")} == told[judge]


def test_pictures_of_an_earlier_report_go_and_what_is_not_ours_stays(tmp_path):
    report_of(ImagePairs(images([0.9]), images([0.1]), ["a hand"]), tmp_path)
    (tmp_path / "report_files/mine.webp").write_bytes(b"mine")
    earlier = set(os.listdir(tmp_path / "report_files"))
    report_of(ImagePairs(images([0.9]), images([0.4]), ["a hand"]), tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    now = set(os.listdir(tmp_path / "report_files"))
    assert now == {*re.findall(r'src="report_files/(\w+\.webp)"', html), "mine.webp"} and len(now - earlier) == 2


def test_pictures_and_figures_are_of_the_same_pairs(tmp_path):
    judge = BrightnessJudge(1.0)
    figures = measure(PAIRS, {"judge": judge}, show_progress=False)
    pictures = draw_pairs(ImagePairs(images([0.9]), images([0.1]), ["a hand"]), judge)
    with pytest.raises(ValueError, match="`pictures` are of 1 pairs, but `figures` of 6"):
        render(figures, pictures, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_picture_of_some_is_spread_over_all():
    whole = ImagePairs(images([i / 100 for i in range(40)]), images([0.5] * 40), [f"prompt {i}" for i in range(40)])
    drawn = draw_pairs(whole, BrightnessJudge(1.0), count=5)
    assert drawn.grid.note == "5 of 40 images, evenly spaced and not picked." and len(drawn.each) == 40


def test_summary_says_how_to_use_the_result(made):
    text = io.StringIO()
    print_summary(made[0], file=text)
    lines = text.getvalue().splitlines()
    (row,) = [line for line in lines if "artifact frequency, judge" in line]
    assert row.split()[3:7] == ["83.3", "%", "33.3", "%"]
    code = "\n".join(line.strip() for line in lines[-3:])
    compile(code, "summary", "exec")
    assert 'from_pretrained("runs/base")' in code and 'load_lora_weights("runs/lora")' in code
    errors = "misses 3.0 %, false alarms 2.0 %, scenes 2000, misses by kind (extra 1.0 %, fused undefined)"
    assert any(errors in line for line in lines)
    (row,) = [line for line in lines if line.split()[:1] == ["hand"]]
    assert row.split() == ["hand", "100.0", "%", "50.0", "%"]


def test_categories_of_other_prompts_are_shown_and_count_nowhere_else(tmp_path):
    def pairs(reds, category):
        return ImagePairs(images(reds), images(reds), ["a prompt"] * len(reds), None, [category] * len(reds))

    judge, whole = BrightnessJudge(1.0), pairs([0.9], "hand")
    plain = measure(pairs([0.3, 0.3], "cup"), {"judge": judge}, show_progress=False)
    figures = measure(whole, {"judge": judge}, show_progress=False)
    figures["categories"] |= plain["categories"]
    report = render(figures, draw_pairs(whole, judge), tmp_path)
    assert list(report["categories"]) == ["hand", "cup"]
    assert report["artifact_frequency"]["judge"]["before"] == 1 and report["counts"]["images"] == 1
    assert ">cup</td>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_least_input(tmp_path):
    report = report_of(ImagePairs(images([0.9]), images([0.1]), ["a hand"]), tmp_path)
    assert report["artifact_frequency"]["judge"]["before"] == 1
    assert report["fidelity"]["before"] is None and report["diversity"] == {"before": None, "after": None}
    assert report["categories"] == {} and report["judge_error_rates"] is None
    assert not (tmp_path / "curves.png").exists()
    text = io.StringIO()
    print_summary(report, file=text)
    assert "LoRA" not in text.getvalue() and "Use it" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_diversity_from_images_of_its_own():
    figures = measure(
        ImagePairs(images([0.9, 0.8]), images([0.1, 0.2]), ["a hand", "a face"]),
        {"judge": BrightnessJudge(1.0)},
        features={"colour": features},
        diversity_pairs=ImagePairs(images([0.9, 0.1, 0.4]), images([0.4, 0.4, 0.4]), ["a dog"] * 3),
        show_progress=False,
    )
    assert figures["diversity"]["after"] == pytest.approx(0, abs=1e-6)
    assert figures["diversity"]["before"] == pytest.approx((0.8 + 0.5 + 0.3) / 3)
    assert figures["counts"]["diversity_images"] == 3 and figures["counts"]["images"] == 2


def test_a_model_judges_without_dropout_and_is_left_as_it_was():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.9)

        def confidence(self, images):
            assert not torch.is_grad_enabled()
            return self.dropout(images[:, :1])

    model = Model().train()
    report = measure(PAIRS, {"judge": model}, show_progress=False)
    assert report["artifact_frequency"]["judge"]["before"] == pytest.approx(5 / 6)
    assert model.training


def test_images_are_brought_to_where_the_judge_is():
    class Elsewhere(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, device="meta"))

        def confidence(self, images):
            assert images.device.type == "meta"
            return torch.zeros(len(images), 1, 16, 16)

    assert measure(PAIRS, {"judge": Elsewhere()}, show_progress=False)["max_confidence"]["judge"]["before"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"after": images(AFTER[:5])}, r"\(6, 3, 16, 16\) and \(5, 3, 16, 16\)"),
        ({"before": images(BEFORE) * 2 - 1}, r"`before` must be floats in \[0, 1\]"),
        ({"after": (images(AFTER) * 255).byte()}, r"`after` must be floats in \[0, 1\], found torch.uint8"),
        ({"prompts": PROMPTS[:2]}, "`prompts` must have one entry per image, found 2"),
        ({"seeds": [1]}, "`seeds` must have one entry per image, found 1"),
        ({"categories": ["x"]}, "`categories` must have one entry per image, found 1"),
    ],
)
def test_what_is_no_pair_of_images_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ImagePairs(**({"before": images(BEFORE), "after": images(AFTER), "prompts": PROMPTS} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"judges": {}}, "`judges` is empty"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        (
            {"features": {"colour": features}, "pairs": ImagePairs(images(BEFORE), images(AFTER), list("abcdef"))},
            "every image has a prompt of its own",
        ),
        ({"fidelity": lambda images, prompts: torch.zeros(1)}, "1 rows for 6 images"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        measure(**({"pairs": PAIRS, "judges": {"judge": BrightnessJudge(1.0)}, "show_progress": False} | change))


def test_a_judge_has_to_judge():
    with pytest.raises(TypeError, match=r"judges\['judge'\].*confidence"):
        measure(PAIRS, {"judge": fidelity})


def test_files_hold_no_absolute_path_and_what_is_printed_does(tmp_path):
    pairs, judge = ImagePairs(images([0.9]), images([0.1]), ["/tmp/a hand"]), BrightnessJudge(1.0)
    base, lora = f"{tmp_path}/base", f"{tmp_path}/treated"
    code = f'pipe = load("{base}")\npipe.load_lora_weights("{lora}")'
    run = TreatmentRun(lora, base, code, details={"dataset": f"{tmp_path}/data.jsonl", "hub": "org/data"})
    figures = measure(pairs, {"judge": judge}, show_progress=False)
    report = render(figures, draw_pairs(pairs, judge), tmp_path / "report", run)
    written = json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8"))
    assert written["loading_code"] == 'pipe = load("base")\npipe.load_lora_weights("treated")'
    assert (written["lora_dir"], written["base_model"]) == ("treated", "base")
    assert written["details"] == {"dataset": "data.jsonl", "hub": "org/data"}
    assert written["images"][0]["prompt"] == "/tmp/a hand"
    html = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in html and "The LoRA lies in treated." in html
    text = io.StringIO()
    print_summary(report, file=text)
    assert f'load_lora_weights("{lora}")' in text.getvalue() and f"lies in {lora}." in text.getvalue()
