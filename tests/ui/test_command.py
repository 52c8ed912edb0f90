# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""`diffdoctor ui`, used wrongly: said before anything is loaded."""

import argparse

import pytest

from diffdoctor import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "nothing to show: give `--annotate`"),
        ("--annotate images", "`--annotate` and `--queue` belong together"),
        ("--queue masks", "`--annotate` and `--queue` belong together"),
        ("--before a --detector miniature", "`--before` and `--after` belong together"),
        ("--before a --after b", "need `--detector`"),
        ("--detector miniature --port 0", "`--port` must lie in [1, 65535], found 0"),
        ("--detector miniature --max-upload 0", "`--max-upload` must be at least 1, found 0"),
        ("--annotate a --queue b --loan-minutes 0", "`--loan-minutes` must be positive, found 0"),
        ("--share-space space", "`--share-space` needs `--detector`"),
    ],
)
def test_wrong_use_is_named(arguments, words, capsys):
    assert main(["ui", *arguments.split()]) == 1
    assert words in capsys.readouterr().err


def test_the_address_is_that_of_this_machine_alone_unless_asked_for():
    from diffusers_diffdoctor.cli.ui import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args([]).host == "127.0.0.1"
