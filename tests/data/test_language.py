# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Language models over a real connection: nothing is lost, nothing is asked twice, nothing is overspent, no key is kept."""

import json
import time
from email.utils import formatdate

import pytest
from fixtures.rows import photo_bytes, write_rows
from language_server import TOKENS_IN, TOKENS_OUT, serve

from diffdoctor import main
from diffusers_diffdoctor.data import find_shards
from diffusers_diffdoctor.data.categorize import read_json
from diffusers_diffdoctor.data.language import AnswerCache, Asker, Budget, BudgetSpent, Endpoint, NoAnswer, Request
from diffusers_diffdoctor.data.language.client import retry_after
from diffusers_diffdoctor.data.vocabulary import Vocabulary, plain_name


KEY = "sk-not-to-be-found-anywhere"


def asker(server, folder, budget=None, timeout=10.0, concurrency=16, **options):
    client = Endpoint("some/model", server.url, timeout=timeout, concurrency=concurrency)
    options.setdefault("first_wait", 0.01)
    options.setdefault("longest_wait", 0.05)
    return Asker(client, AnswerCache(folder / "answers.sqlite"), budget or Budget(), **options)


def questions(count, seed=0):
    return [Request(f"one prompt of this category: hand {i}. Go", seed=seed) for i in range(count)]


@pytest.mark.slow
def test_a_thousand_requests_with_faults_lose_none_and_ask_none_twice(tmp_path):
    with serve(faults=0.2, slow=1.0) as server:
        asking = asker(server, tmp_path, timeout=0.6, attempts=12, readings=6)
        answers = list(asking.ask_all(questions(1000), read_json))
        counts = server.counts()
        assert len(answers) == 1000
        for number, answer in enumerate(answers):  # each has its own
            assert f"hand {number} " in json.loads(answer.text)["prompts"][0]
        assert set(counts["faults"]) == {"429", "500", "slow", "drop", "nonsense"}
        assert sum(counts["answered"].values()) == 1000
        assert set(counts["answered"].values()) == {1}
        # the server was asked as often as the run says
        assert sum(counts["asked"].values()) == 1000 + sum(counts["faults"].values()) == asking.counts["asked"]
        again = asker(server, tmp_path)
        assert list(again.ask_all(questions(1000), read_json)) == answers
        assert server.total() == sum(counts["asked"].values())
        assert again.counts == {"cached": 1000}


def test_equal_requests_are_asked_once(tmp_path):
    with serve() as server:
        answers = list(asker(server, tmp_path).ask_all(questions(1) * 50, read_json))
        assert len(answers) == 50 and len(set(answers)) == 1 and server.total() == 1


@pytest.mark.parametrize(
    "budget, sent",
    [
        (Budget(requests=7), 7),
        (Budget(tokens=10 * (TOKENS_IN + TOKENS_OUT)), None),
        (Budget(money=10 * 0.0003, price_in=2.0, price_out=10.0), None),
    ],
)
def test_a_spent_budget_stops_and_a_rerun_sends_nothing(tmp_path, budget, sent):
    requests = [Request(f"one prompt of this category: dog {i}. Go", most_tokens=TOKENS_OUT) for i in range(30)]
    with serve() as server:
        for _ in range(2):
            with pytest.raises(BudgetSpent, match=r"budget of (requests|tokens|money) is spent: .* raise the limit"):
                list(asker(server, tmp_path, budget, concurrency=1).ask_all(requests, read_json))
        total = server.total()
        assert total == (sent or 10)
        raised = asker(server, tmp_path, concurrency=1)
        assert len(list(raised.ask_all(requests, read_json))) == 30
        assert server.total() == 30  # none of those that were paid for


def test_a_budget_holds_with_many_at_once(tmp_path):
    with serve(faults=0.3, slow=0.1) as server:
        with pytest.raises(BudgetSpent):
            list(asker(server, tmp_path, Budget(requests=40)).ask_all(questions(200), read_json))
        assert server.total() == 40


def test_a_server_is_left_alone_for_as_long_as_it_asks(tmp_path):
    with serve(always="429", retry_after=1) as server:
        begin = time.monotonic()
        with pytest.raises(NoAnswer, match="in 2 attempts; the last one: status 429"):
            list(asker(server, tmp_path, attempts=2, concurrency=1).ask_all(questions(1), read_json))
        assert 1 <= time.monotonic() - begin < 5
        assert server.total() == 2


def test_retry_after_is_a_number_or_a_date():
    assert retry_after("7") == 7 and retry_after(None) == retry_after("soon") == retry_after("nan") == 0
    assert 50 < retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60


def test_a_wrong_key_stops_at_once(tmp_path):
    with serve(always="401") as server:
        with pytest.raises(ValueError, match="--api-key-env"):
            list(asker(server, tmp_path, concurrency=1).ask_all(questions(5), read_json))
        assert server.total() <= 2


def test_what_cannot_be_read_and_what_is_refused_is_kept(tmp_path):
    for fault, sent in (("nonsense", 2), ("400", 1)):
        with serve(always=fault) as server:
            (tmp_path / fault).mkdir()
            for _ in range(2):
                (answer,) = asker(server, tmp_path / fault).ask_all(questions(1), read_json)
                assert bool(answer.refused) == (fault == "400")
            assert server.total() == sent


def test_names_become_one():
    for word in ("Hands", "a hand", "HAND.", "the hands"):
        assert plain_name(word) == "hand"
    assert [plain_name(word) for word in ("People", "buses", "boxes", "glass", "berries", "teddy bears", "7", "")] == [
        "person", "bus", "box", "glass", "berry", "teddy bear", "", "",
    ]  # fmt: skip
    open_one = Vocabulary(synonyms={"hand": ["palm"]})
    assert open_one.merge(["Palms", "hand", "Dogs"]) == ["hand", "dog"]
    assert Vocabulary(["Hand"], {"hand": ["palm"]}).merge(["palm", "dog", "hands"]) == ["Hand"]
    with pytest.raises(ValueError, match="means both"):
        Vocabulary(synonyms={"hand": ["palm"], "tree": ["palm"]})


@pytest.fixture
def pool(tmp_path):
    rows = [{"image": {"bytes": photo_bytes(i), "path": f"{i}.png"}} for i in range(12)]
    rows[3]["image"]["bytes"] = b"no image"
    rows[5]["category"] = ["kept"]
    write_rows(tmp_path / "pool/train-00000.parquet", rows[:7])
    write_rows(tmp_path / "pool/train-00001.parquet", rows[7:])
    return tmp_path / "pool"


def test_categorize_by_the_command(tmp_path, pool, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_machine")
    output = tmp_path / "named"
    with serve() as server:
        command = ["data", "categorize", str(pool), "--model", "m", "--base-url", server.url, "-o", str(output)]
        assert main([*command, "--api-key-env", "MY_KEY", "--max-requests", "4"]) == 1
        assert "budget of requests is spent" in capsys.readouterr().err
        assert main([*command, "--api-key-env", "MY_KEY"]) == 0
        assert "12 in = 11 out + 1 quarantined" in capsys.readouterr().out
        assert server.counts()["keys"] == [f"Bearer {KEY}"] and server.total() == 10
        assert main([*command, "--api-key-env", "MY_KEY"]) == 0 and server.total() == 10
        assert main([*command[:-1], str(tmp_path / "other"), "--cache", f"{output}.answers.sqlite"]) == 0
        assert server.total() == 10  # another dataset, the same questions
    rows = [row for shard in find_shards(output) for row in shard.read()]
    assert [row["image"]["path"] for row in rows] == [f"{i}.png" for i in range(12) if i != 3]
    assert rows[4]["category"] == ["kept"]
    assert {name for row in rows for name in row["category"]} <= {"hand", "face", "dog", "house", "cup", "kept"}
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_no_token_of_the_machine_goes_to_a_stranger(tmp_path, pool, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_machine")
    with serve() as server:
        list(asker(server, tmp_path).ask_all(questions(1), read_json))
        (key,) = server.counts()["keys"]
    assert key == "Bearer none"


def test_answers_that_cannot_be_read_are_quarantined(tmp_path, pool, capsys):
    with serve(always="nonsense") as server:
        command = [
            "data",
            "categorize",
            str(pool),
            "--model",
            "m",
            "--base-url",
            server.url,
            "-o",
            str(tmp_path / "o"),
        ]
        assert main(command) == 0
        assert "12 in = 1 out + 11 quarantined" in capsys.readouterr().out
        assert main(command) == 0 and server.total() == 20


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--base-url", "localhost:8000"], ["base_url", "http://"]),
        (["--api-key-env", "NOT_SET_HERE"], ["NOT_SET_HERE", "not set"]),
        (["--max-cost", "1"], ["money", "price_in"]),
        (["--likelihood"], ["--local", "--vocabulary"]),
        (["--most", "0"], ["most", "0"]),
        (["--timeout", "0"], ["timeout", "0"]),
    ],
)
def test_wrong_arguments_are_named(tmp_path, pool, capsys, flags, words):
    assert main(["data", "categorize", str(pool), "--model", "m", "-o", str(tmp_path / "o"), *flags]) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
