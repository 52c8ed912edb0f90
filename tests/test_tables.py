# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import csv
import os

from diffusers_diffdoctor.tables import write_csv


def test_what_is_read_again_is_what_was_written_and_nothing_is_a_formula(tmp_path):
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", 'a "b", c', "two\nlines", "é 手", " =1", ""]
    rows = [{"text": text, "number": -0.5, "flag": True, "nothing": None, "more": 1} for text in texts]
    path = write_csv(tmp_path / "table.csv", ["text", "number", "flag", "nothing"], iter(rows))
    with open(path, encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["text"].removeprefix("'") for row in found] == texts
    assert not any(row["text"].startswith(("=", "+", "-", "@", "\t", "\r", "\n")) for row in found)
    assert {(row["number"], row["flag"], row["nothing"]) for row in found} == {("-0.5", "True", "")}
    assert os.listdir(tmp_path) == ["table.csv"]


def test_names_that_are_not_utf_8_are_named(tmp_path):
    path = write_csv(tmp_path / "table.csv", ["path"], [{"path": os.fsdecode(b"/caf\xe9.png")}])
    assert path.read_bytes() == b"path\r\n/caf\\udce9.png\r\n"
