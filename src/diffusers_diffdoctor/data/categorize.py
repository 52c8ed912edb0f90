# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Categories by a language model that sees: what is in each image, in one vocabulary."""

import io
import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image

from .language.asking import Asker
from .language.client import Request
from .schema import Row, decode_image
from .shards import Quarantined, Shard
from .stage import Result, Stage, row_name
from .vocabulary import Vocabulary


QUESTION = (
    "Which things are to be seen in this image? Name up to {most} categories, the most important first, each by a common "
    'English noun in the singular, such as hand or dog.{choices} Answer with JSON alone: {{"categories": ["..."]}}'
)
CHOICES = " Choose from these only: {names}."


@dataclass(frozen=True)
class Categorize(Stage):
    """Rows get the names of what is in their images. Rows that have a category stay as they are, unless `again` says otherwise.

    Images that cannot be read, and those for which the model says nothing that can be read, are quarantined.

    Args:
        model: what the rows' categories are by, for the record; the endpoint's or the local one's name.
        vocabulary: the only names; without them any.
        synonyms: (name, its synonyms), ...
        most: names for an image.
        side: longest side in pixels of what the model is shown.
        again: also replace categories that are there.
        asker: how the model is asked.
    """

    model: str
    vocabulary: tuple[str, ...] = ()
    synonyms: tuple[tuple[str, tuple[str, ...]], ...] = ()
    most: int = 5
    side: int = 768
    again: bool = False
    asker: Asker | None = field(default=None, compare=False, repr=False)

    name: ClassVar[str] = "categorize"

    def __post_init__(self):
        if not 1 <= self.most <= 50:
            raise ValueError(f"`most` must lie in [1, 50], found {self.most}.")
        if self.side < 32:
            raise ValueError(f"`side` must be at least 32 pixels, found {self.side}.")
        self._vocabulary()

    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.vocabulary, dict(self.synonyms))

    def question(self, image: bytes) -> Request:
        names = self._vocabulary().names if self.vocabulary else ()
        choices = CHOICES.format(names=", ".join(names)) if names else ""
        item: dict[str, Any] = {"type": "string"} | ({"enum": list(names)} if names else {})
        listed = {"type": "array", "items": item, "minItems": 1, "maxItems": self.most}
        schema = {
            "type": "object",
            "properties": {"categories": listed},
            "required": ["categories"],
            "additionalProperties": False,
        }
        return Request(QUESTION.format(most=self.most, choices=choices), image, schema, names)

    def process(self, rows: Iterator[Row], shard: Shard) -> Iterator[Result]:
        if self.asker is None:
            raise ValueError("`asker` is missing: the stage needs a model to ask.")
        vocabulary = self._vocabulary()
        waiting: deque[tuple[Row, Result | None]] = deque()  # rows that were read ahead of their answers

        def requests() -> Iterator[Request]:
            for row in rows:
                if row["category"] and not self.again:
                    waiting.append((row, row))
                    continue
                try:
                    image = shown(row, self.side)
                except Exception as error:  # decoders raise many types; one bad file must not stop the rest
                    waiting.append((row, Quarantined(row_name(row), str(error) or type(error).__name__)))
                    continue
                waiting.append((row, None))
                yield self.question(image)

        for answer in self.asker.ask_all(requests(), lambda text: read_categories(text, vocabulary, self.most)):
            while waiting[0][1] is not None:
                yield waiting.popleft()[1]
            row, _ = waiting.popleft()
            if answer.refused:
                yield Quarantined(row_name(row), f"the model {answer.refused}")
                continue
            try:
                yield {**row, "category": read_categories(answer.text, vocabulary, self.most)}
            except ValueError as error:
                yield Quarantined(row_name(row), str(error))
        while waiting:
            yield waiting.popleft()[1]


def shown(row: Row, side: int) -> bytes:
    """The image of a row as a JPEG whose longer side has at most `side` pixels."""
    image = decode_image(row)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def read_json(text: str) -> Mapping[str, Any]:
    """The JSON object of an answer, which may stand in a fence or between words. Raises a ValueError where there is none."""
    start, end = text.find("{"), text.rfind("}")
    try:
        found = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("the answer holds no JSON object")
    return found


def read_categories(text: str, vocabulary: Vocabulary, most: int) -> list[str]:
    """The names of an answer. Raises a ValueError where there is none that can be used; the reason can be counted."""
    names = read_json(text).get("categories")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("the answer has no list `categories` of texts")
    merged = vocabulary.merge(names)[:most]
    if not merged:
        raise ValueError("the answer names nothing of the vocabulary" if names else "the answer names nothing")
    return merged
