# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Prompts are the texts that a text editor shows in the file, whatever they look like."""

import codecs
import csv
import json
import re

import pytest
from datasets import Dataset
from PIL import Image

from diffusers_diffdoctor.treatment.prompt_files import distinct, hold_out, read_prompt_file


# what types are guessed from, and what str.splitlines cuts
TEXTS = [
    "a cat",
    "None",
    "NA",
    "null",
    "NaN",
    "true",
    "2024",
    "1e5",
    "007",
    'a, b "c" d',
    "12 monkeys",
    "#tag",
    "ein Käse",
]
ODD_LINES = ["one\u2028two", "an old\x0cman", "next\x85line", "record\x1eseparator", "tab\tbed"]


def read(path, column="prompt"):
    return read_prompt_file(str(path), column)["prompt"][:]


def write(path, text, bom=False, newline="\n"):
    path.write_bytes((codecs.BOM_UTF8 if bom else b"") + text.replace("\n", newline).encode())
    return path


def as_csv(texts, column="prompt"):
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    return "\n".join([column, *quoted, ""])


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [False, True])
def test_every_format_gives_the_same_texts(tmp_path, bom, newline):
    texts = TEXTS + ODD_LINES
    files = {
        "a.txt": "# from the wiki\n" + "\n".join(texts) + "\n\n",
        "a.csv": as_csv(texts),
        "a.jsonl": "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts),
        "a.json": json.dumps([{"prompt": text} for text in texts], indent=1),
        "b.json": json.dumps(texts),
    }
    for name, text in files.items():
        assert read(write(tmp_path / name, text, bom, newline)) == texts, name


def test_comments_are_lines_that_begin_with_a_hash_and_a_blank(tmp_path):
    text = "# hands\na hand\n#\n#hashtag sign over a shop\n  ## faces\na face # not a comment\n \n#\tdogs\n"
    assert read(write(tmp_path / "a.txt", text, bom=True)) == [
        "a hand",
        "#hashtag sign over a shop",
        "a face # not a comment",
    ]


def test_csv_as_python_writes_it(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["category", "text"], *(["hand", text] for text in [*TEXTS, "two\nlines"])])
    dataset = read_prompt_file(str(tmp_path / "a.csv"), "text")
    assert dataset["prompt"][:] == [*TEXTS, "two\nlines"]
    assert dataset["category"][:] == ["hand"] * (len(TEXTS) + 1)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        (
            "a.csv",
            "prompt\na cat, asleep\n",
            r"has 2 cells in line 2, but 1 columns \['prompt'\]. Put a text with commas",
        ),
        ("a.csv", 'prompt\na dog\n"a "good" cat"\n', "is no CSV from line 3 on: .* double those"),
        ("a.csv", 'prompt\n"a dog\na cat\n', "is no CSV from line 2 on"),
        (
            "a.csv",
            "text\na dog\n",
            r"line 2, has no column 'prompt', only \['text'\]. Name one of them with `--prompt_column`",
        ),
        ("a.csv", 'prompt,category\n"two\nlines",x\n" ",y\n', "has no prompt in line 4: found ' '"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": 7}\n', "has no prompt in line 3: found 7"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', "has no prompt in line 2: found None"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "has no JSON in line 2"),
        ("a.jsonl", '["a"]\n', "has a list in line 1, but must have an object"),
        ("a.json", '{"prompt": "a"}', "holds a dict, but must hold a list"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', "One object for each line is the format .jsonl"),
        ("a.txt", "# nothing\n\n", "holds no prompt"),
        ("a.dat", "a cat\n", "has none of the endings .txt, .csv, .jsonl, .json"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, error):
    with pytest.raises(ValueError, match=error):
        read(write(tmp_path / name, text))


def test_other_encodings_and_missing_files_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("ein Käse".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("a cat".encode("utf-16"))
    for name in ("a.txt", "b.txt"):
        with pytest.raises(ValueError, match=f"{name}' is not UTF-8 .* Save it with that encoding"):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*no.txt'"):
        read(tmp_path / "no.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder without data"):
        read(tmp_path / "empty")


def test_a_folder_is_read_by_datasets(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/train.jsonl", '{"text": "a cat"}\n{"text": "a dog"}\n')
    assert read(tmp_path / "data", "text") == ["a cat", "a dog"]
    with pytest.raises(ValueError, match=r"has no column 'prompt', only \['text'\]"):
        read(tmp_path / "data")


def test_a_folder_that_cannot_be_read_is_named_in_a_line(tmp_path):
    for folder, name, text, error in (
        ("cut", "a.csv", 'prompt\n"a\n', "cut' cannot be read: Error tokenizing"),
        ("other", "test.jsonl", '{"prompt": "a"}\n', 'other\' cannot be read: Unknown split "train"'),
    ):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / name, text)
        with pytest.raises(ValueError, match=error) as caught:
            read(tmp_path / folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["prompt", "text"])
def test_images_without_prompts_are_told_what_they_lack(tmp_path, column):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/0.png")
    with pytest.raises(ValueError, match=r"photos' has images without prompts: add a file metadata\.jsonl") as caught:
        read(tmp_path / "photos", column)
    line = re.search(r"({.*})", str(caught.value))[1]
    write(tmp_path / "photos/metadata.jsonl", line + "\n")  # the remedy works
    assert read(tmp_path / "photos", column) == ["a photo of a hand"]


def test_no_held_out_prompt_is_trained_on():
    dataset = Dataset.from_dict({"prompt": ["a hand"] * 10 + [f"prompt {i}" for i in range(10)] + ["a hand"] * 11})
    rows, duplicates = distinct(dataset)
    assert duplicates == 20 and rows["prompt"][:] == ["a hand", *(f"prompt {i}" for i in range(10))]
    train, held_out = hold_out(rows)
    assert held_out["prompt"][:] == ["a hand", "prompt 9"]
    assert sorted([*train["prompt"], *held_out["prompt"]]) == sorted(rows["prompt"])
    with pytest.raises(ValueError, match="of 1 prompt none is left to train on"):
        hold_out(rows.select([0]))
