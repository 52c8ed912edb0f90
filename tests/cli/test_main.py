# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
import subprocess
import sys
from types import SimpleNamespace

import pytest

import diffdoctor as entry
from diffusers_diffdoctor import __version__


def test_help_lists_the_commands_and_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from diffdoctor import main\n"
        "try:\n"
        "    main({argv})\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "heavy = {{'torch', 'numpy', 'PIL', 'transformers', 'diffusers', 'diffusers_diffdoctor'}}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    for argv, words in (
        (["--help"], entry.COMMANDS),
        (["--version"], [__version__]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.format(argv=argv)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert all(word in done.stdout for word in words)
        assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_every_command_of_the_table_is_a_module(name):
    module = entry.command_module(name)
    assert callable(module.run) and callable(getattr(module, "add_arguments", len))
    with pytest.raises(SystemExit) as end:
        entry.main([name, "--help"])
    assert end.value.code == 0


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["diagnose"], ["diagnose", "x.png"], ["diagnose", "-o", "x", "--top-k"]]
)
def test_wrong_use_is_status_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        entry.main(argv)
    assert end.value.code == 2
    assert "usage: diffdoctor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ValueError("`--x` is wrong"), 1, "diffdoctor fake: error: `--x` is wrong\n"),
        (FileNotFoundError("no file"), 1, "diffdoctor fake: error: no file\n"),
        (KeyboardInterrupt(), 130, "\ndiffdoctor fake: interrupted\n"),
    ],
)
def test_expected_errors_are_one_line(monkeypatch, capsys, error, status, words):
    def run(args):
        raise error

    monkeypatch.setitem(entry.COMMANDS, "fake", "a command of the test")
    fake = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "diffusers_diffdoctor.cli.fake", fake)
    assert entry.main(["fake"]) == status
    assert capsys.readouterr().err == words
    if status == 1:
        with pytest.raises(type(error)):
            entry.main(["--traceback", "fake"])


def test_bugs_keep_their_traceback(monkeypatch):
    def run(args):
        raise RuntimeError("a bug")

    monkeypatch.setitem(entry.COMMANDS, "fake", "a command of the test")
    fake = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "diffusers_diffdoctor.cli.fake", fake)
    with pytest.raises(RuntimeError, match="a bug"):
        entry.main(["fake"])


def test_a_value_or_what_follows_two_dashes_is_no_flag(tmp_path, capsys):
    """Both are taken for what they are, and fail for another reason."""
    for argv in (["export-lora", "--", "--fromat"], ["export-lora", str(tmp_path), "--form", "kohya"]):
        assert entry.main(argv) == 1
        assert "did you mean" not in capsys.readouterr().err
