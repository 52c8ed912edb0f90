# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Names of categories as one vocabulary: "Hands", "a hand" and "human hand" are one."""

import re
import unicodedata
from collections.abc import Mapping, Sequence


IRREGULAR = {
    "people": "person",
    "persons": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "geese": "goose",
    "mice": "mouse",
    "knives": "knife",
    "leaves": "leaf",
    "wolves": "wolf",
    "shelves": "shelf",
    "loaves": "loaf",
    "scarves": "scarf",
    "potatoes": "potato",
    "tomatoes": "tomato",
    "heroes": "hero",
}
# ends in s, and is one
SINGULAR = {
    "bus",
    "gas",
    "glasses",
    "lens",
    "clothes",
    "scissors",
    "trousers",
    "jeans",
    "news",
    "series",
    "species",
    "canvas",
}
ARTICLES = ("a ", "an ", "the ")
LONGEST = 60  # letters of a name


def singular(word: str) -> str:
    """The singular of an English word in lower case, by rules; what they do not know stays."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) < 4 or word in SINGULAR or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zzes")):
        return word[:-2]
    if word == "buses":
        return "bus"
    return word[:-1]


def plain_name(name: str) -> str:
    """In lower case, without article and punctuation, its last word in the singular. Empty for what is no name."""
    text = unicodedata.normalize("NFKC", name).casefold()
    text = " ".join(re.sub(r"[^\w\s'-]|_", " ", text).split()).strip(" -'")
    for article in ARTICLES:
        text = text.removeprefix(article)
    if not text or len(text) > LONGEST or not any(letter.isalpha() for letter in text):
        return ""
    *first, last = text.split()
    return " ".join([*first, singular(last)])


class Vocabulary:
    """What a category may be called, and what it is called then.

    Args:
        names: the only ones; without them any.
        synonyms: name -> others of the same thing.

    Raises:
        ValueError: a name is none, or a word means two things.
    """

    def __init__(self, names: Sequence[str] = (), synonyms: Mapping[str, Sequence[str]] | None = None):
        self._known: dict[str, str] = {}
        self.closed = bool(names)
        for name in [*names, *(synonyms or {})]:
            self._add(name, name.strip() if isinstance(name, str) else name)
        for name, others in (synonyms or {}).items():
            if isinstance(others, str) or not all(isinstance(other, str) for other in others):
                raise ValueError(f"`synonyms` of {name!r} must be a list of texts, found {others!r:.100}.")
            for other in others:
                self._add(other, self._known[plain_name(name)])
        listed = {plain_name(name) for name in names}
        outside = [name for name in synonyms or {} if names and plain_name(name) not in listed]
        if outside:
            raise ValueError(f"`synonyms` has {outside[0]!r}, which is not in the vocabulary. Add it there.")

    def _add(self, word: str, name: str) -> None:
        plain = plain_name(word) if isinstance(word, str) else ""
        if not plain:
            raise ValueError(f"{word!r:.100} is no name of a category: write a word or a few.")
        if self._known.setdefault(plain, name) != name and plain_name(self._known[plain]) != plain_name(name):
            raise ValueError(f"{word!r} means both {self._known[plain]!r} and {name!r}: let it mean one.")

    @property
    def names(self) -> tuple[str, ...]:
        """As given, each once."""
        return tuple(dict.fromkeys(self._known.values()))

    def name_of(self, word: str) -> str | None:
        """The name of the thing, or None where there is none in a closed vocabulary."""
        plain = plain_name(word)
        return self._known.get(plain) or (None if self.closed else plain or None)

    def merge(self, words: Sequence[str]) -> list[str]:
        """Their names, each once, in order."""
        return list(dict.fromkeys(name for word in words if (name := self.name_of(word))))
