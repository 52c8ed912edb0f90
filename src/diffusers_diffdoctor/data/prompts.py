# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Prompts by a language model for categories that need more images: diverse, filtered, none twice, each with its seed."""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..seeds import derive_seed
from .categorize import read_json
from .language.asking import Asker
from .language.client import Request


QUESTION = (
    "Write {count} prompts for an image generator. Each is one sentence in the language with the code {language} and shows things of "
    "this category: {category}. Vary subject, number, pose, view, place, light and style; no two may be alike. This is request "
    'number {round}: do not repeat earlier ones. Answer with JSON alone: {{"prompts": ["...", "..."]}}'
)
SCHEMA = {
    "type": "object",
    "properties": {"prompts": {"type": "array", "items": {"type": "string"}, "minItems": 1}},
    "required": ["prompts"],
    "additionalProperties": False,
}
TOKENS_FOR_ONE = 80  # of an answer, for each prompt in it
# words by which a language is told from the others; short ones that others have too are left out
COMMON_WORDS = {
    "en": "the and with of is are his her their on at from by".split(),
    "de": "der die das und mit von ist sind auf ein eine einer dem den im".split(),
    "fr": "le la les et avec une des du est sont dans sur au aux".split(),
    "es": "el la los las y con una del es son en sobre al por".split(),
    "it": "il lo gli e con una della di è sono nel sulla che".split(),
    "nl": "het een van en met zijn op aan door bij naar".split(),
}


@dataclass(frozen=True)
class PromptRules:
    """Which prompts are good enough.

    Args:
        least_words, most_words: of a prompt.
        language: code of a language of `COMMON_WORDS`: letters must be Latin, and no other language may have more of its common
            words in the prompt. None: not looked at.
        banned: words and phrases, whatever their case, as whole words.
        similarity: from this share of common groups of three letters on, two prompts are one (0, 1].
    """

    least_words: int = 3
    most_words: int = 60
    language: str | None = "en"
    banned: tuple[str, ...] = ()
    similarity: float = 0.7

    def __post_init__(self):
        if not 1 <= self.least_words <= self.most_words:
            raise ValueError(
                f"`least_words` must lie in [1, most_words = {self.most_words}], found {self.least_words}."
            )
        if self.language is not None and self.language not in COMMON_WORDS:
            raise ValueError(f"`language` must be one of {', '.join(COMMON_WORDS)}, or None, found {self.language!r}.")
        if not 0 < self.similarity <= 1:
            raise ValueError(f"`similarity` must lie in (0, 1], found {self.similarity}.")
        if any(not word.strip() for word in self.banned):
            raise ValueError("`banned` has an empty word, which would be in every prompt.")

    def wrong(self, prompt: str) -> str | None:
        """Why this prompt is not taken, or None."""
        words = words_of(prompt)
        if len(words) < self.least_words:
            return "too short"
        if len(words) > self.most_words:
            return "too long"
        text = f" {' '.join(words)} "
        if any(f" {' '.join(words_of(word))} " in text for word in self.banned):
            return "banned word"
        if self.language and not _is_in(words, self.language):
            return "another language"
        return None


def words_of(text: str) -> list[str]:
    """In lower case, without punctuation."""
    return re.findall(r"[^\W_]+", text.casefold())


def _is_in(words: Sequence[str], language: str) -> bool:
    letters = [letter for letter in "".join(words) if letter.isalpha()]
    if sum(letter > "\u024f" for letter in letters) > 0.1 * len(letters):
        return False
    found = {name: sum(word in common for word in words) for name, common in COMMON_WORDS.items()}
    return found[language] == max(found.values())


def trigrams(prompt: str) -> frozenset[str]:
    """Groups of three letters of a text, whatever its case and punctuation."""
    text = f"  {' '.join(words_of(prompt))} "
    return frozenset(text[i : i + 3] for i in range(len(text) - 2))


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Common members as a share of all (Jaccard), in [0, 1]."""
    return len(one & other) / len(one | other) if one or other else 1.0


def write_prompts(
    categories: Sequence[str],
    asker: Asker,
    *,
    count: int = 100,
    rules: PromptRules | None = None,
    seed: int = 0,
    at_once: int = 20,
    most_rounds: int = 20,
    temperature: float = 1.0,
    model: str | None = None,
    progress=lambda prompts: None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Prompts for categories, by as many requests as it takes. The same arguments and answers give the same prompts.

    Args:
        categories: what the prompts show.
        asker: how the model is asked.
        count: prompts for each category.
        rules: which are taken; those that are like one that was taken, of any category, are not.
        seed: of all requests: each has one that follows from it, the category and the round.
        at_once: prompts of one request.
        most_rounds: requests for a category; it then stays short of `count`, which the summary tells.
        model: the name that is recorded; the client's without it.
        progress: is told how many were taken.

    Returns:
        Rows with `prompt`, `category`, `seed` (of the image), `request_seed` and `model`; and the counts: `written` = `taken` + sum
        of `rejected` (by reason), `answers_not_read`, and `short` (category -> how many are missing).

    Raises:
        ValueError: an argument is out of range.
    """
    rules = rules or PromptRules()
    if not categories or not all(isinstance(name, str) and name.strip() for name in categories):
        raise ValueError(f"`categories` must be texts, at least one, found {list(categories)!r:.100}.")
    for name, value in (("count", count), ("at_once", at_once), ("most_rounds", most_rounds)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, found {value}.")
    categories = list(dict.fromkeys(categories))
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in categories}
    known: list[frozenset[str]] = []
    rejected, written, unread = Counter(), 0, 0
    for number in range(most_rounds):
        # all categories of a round at a time: as many requests as the server takes
        asked = [name for name in categories if len(taken[name]) < count]
        seeds = [derive_seed(seed, name, number) for name in asked]
        requests = [
            Request(
                QUESTION.format(count=at_once, language=rules.language or "en", category=name, round=number + 1),
                schema=SCHEMA,
                most_tokens=TOKENS_FOR_ONE * at_once,
                temperature=temperature,
                seed=own,
            )
            for name, own in zip(asked, seeds)
        ]
        for name, own, answer in zip(asked, seeds, asker.ask_all(requests, read_prompts)):
            try:
                prompts = read_prompts(answer.text)
            except ValueError:
                unread += 1
                continue
            for prompt in prompts:
                written += 1
                letters = trigrams(prompt)
                why = "enough" if len(taken[name]) == count else rules.wrong(prompt)
                if why is None and any(similarity(letters, other) >= rules.similarity for other in known):
                    why = "like another"
                if why:
                    rejected[why] += 1
                    continue
                known.append(letters)
                taken[name].append(
                    {
                        "prompt": prompt,
                        "category": name,
                        "seed": derive_seed(seed, name, prompt),
                        "request_seed": own,
                        "model": model or asker.client.model,
                    }
                )
                progress(1)
    rows = [row for name in categories for row in taken[name]]
    counts = {
        "written": written,
        "taken": len(rows),
        "rejected": dict(rejected.most_common()),
        "answers_not_read": unread,
        "short": {name: count - len(found) for name, found in taken.items() if len(found) < count},
    }
    return rows, counts


def read_prompts(text: str) -> list[str]:
    """The prompts of an answer, each on one line. Raises a ValueError where there are none."""
    prompts = read_json(text).get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("the answer has no list `prompts` of texts")
    prompts = [" ".join(prompt.split()) for prompt in prompts]
    if not any(prompts):
        raise ValueError("the answer has no prompt")
    return [prompt for prompt in prompts if prompt]


def flagged_categories(path: str | os.PathLike) -> list[str]:
    """Categories that stand out, of balance.json or categories.csv of `diffdoctor data balance`, or of its folder.

    Raises:
        ValueError: the file is something else, or no category stands out.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "balance.json"
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            # the table writes an apostrophe before what a spreadsheet would compute
            names = [row["name"].removeprefix("'") for row in csv.DictReader(io.StringIO(text)) if row["flag"]]
        else:
            names = json.loads(text)["flagged"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("`flagged` is no list of texts")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is no balance.json or categories.csv of `diffdoctor data balance` ({type(error).__name__}: {error})."
        ) from error
    if not names:
        raise ValueError(f"No category stands out in {str(path)!r}. Name some by --categories.")
    return names
