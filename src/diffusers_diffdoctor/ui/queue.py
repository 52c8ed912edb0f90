# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Images that wait for people: who paints which, for how long, and what is done. All of it lies on the disk.

    FOLDER/queue.json           the images, once they were looked through
    FOLDER/loans.json           who has which image
    FOLDER/suggestions/KEY.png  what the detector said, made when it is first asked for
    FOLDER/annotations/         see `data.annotate`

An image is lent to one page at a time. A loan has a token, which the page shows with each save; a page that was reloaded, or opened a
second time, gets a new token, and the older one is refused: so that nobody's strokes replace those of another.
"""

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from PIL import Image

from ..data.annotate import (
    ARTIFACT,
    DONE,
    DRAFT,
    KEY_LENGTH,
    KINDS,
    SKIPPED,
    Annotation,
    agreement,
    annotation_path,
    annotations_of,
    key_of,
    read_annotation,
    write_annotation,
)
from ..data.schema import Row, decode_image, decode_map, encode_png
from ..data.shards import Quarantined, Shard, rows_at
from ..files import only_run, write_atomically


ITEMS, LOANS, SUGGESTIONS = "queue.json", "loans.json", "suggestions"
KEPT = 16  # images in memory
SUGGESTED = 0.5  # confidence from which the first layer has a pixel

Suggest = Callable[[Image.Image], np.ndarray]  # RGB image -> uint8 (H, W), 255 = 1.0


class Refused(ValueError):
    """The image is somebody else's now, or this page's loan is an older one."""


@dataclass(frozen=True)
class Item:
    """An image of the queue: where its row is, and its size in pixels."""

    key: str
    shard: int
    position: int
    name: str
    width: int
    height: int


class Queue:
    """The images of a dataset and what people paint on them. One process has a folder at a time.

    Args:
        shards: of the dataset, see [`find_or_load_shards`].
        folder: where everything is kept; the same dataset goes on where it was.
        copies: how many annotators are to finish each image; with 2 or more, their agreement is known.
        loan_seconds: after which an image is lent to another, unless the page says that it is still there.
        kinds: of artifact to choose from.
        suggest: gives the first layer; without it the rows' own `artifact_map` does, where they have one.
        restart: where the folder is of another dataset, take this one's images instead. The masks stay, each with its image.
        clock: gives the time in seconds.

    Raises:
        ValueError: an argument out of range, no image can be read, or the folder is of another dataset.
        FolderInUse: another process has the folder.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        folder: str | Path,
        *,
        copies: int = 1,
        loan_seconds: float = 300,
        kinds: Sequence[str] = KINDS,
        suggest: Suggest | None = None,
        restart: bool = False,
        clock: Callable[[], float] = time.time,
    ):
        if copies < 1:
            raise ValueError(f"`copies` must be at least 1, found {copies}.")
        if not loan_seconds > 0:
            raise ValueError(f"`loan_seconds` must be positive, found {loan_seconds}.")
        self.shards, self.folder, self.copies, self.loan_seconds = list(shards), Path(folder), copies, loan_seconds
        self.kinds, self.suggest, self.clock = tuple(kinds), suggest, clock
        self._lock, self._suggesting, self._rows = RLock(), RLock(), OrderedDict()
        self._open = ExitStack()
        self._open.enter_context(only_run(self.folder))
        try:
            plan = self._plan(restart)
            self.items = {item["key"]: Item(**item) for item in plan["items"]}
            self.quarantined: list[dict[str, str]] = plan["quarantined"]
            self._loans: dict[str, dict[str, Any]] = _read_json(self.folder / LOANS) or {}
            self._found = {key: self._on_disk(key) for key in self.items}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another process have the folder."""
        self._open.close()

    # --- images ----------------------------------------------------------------------------------------------------------

    def _plan(self, restart: bool) -> dict[str, Any]:
        inputs = [shard.identity for shard in self.shards]
        plan = _read_json(self.folder / ITEMS)
        if plan is not None and plan["inputs"] == inputs:
            return plan
        if plan is not None:
            if not restart:
                raise ValueError(
                    f"{str(self.folder)!r} is the queue of another dataset. Choose another folder, give the dataset that it was "
                    "begun with, or restart (--restart): masks stay with their images."
                )
            for path in (self.folder / ITEMS, self.folder / LOANS, *self.folder.glob(f"{SUGGESTIONS}/*.png")):
                path.unlink(missing_ok=True)
        items, quarantined = {}, []
        for number, shard in enumerate(self.shards):
            position = 0
            for row in shard.read():
                if isinstance(row, Quarantined):
                    quarantined.append({"name": row.path or "", "reason": row.reason})
                    continue
                name = row["image"]["path"] or ""
                try:
                    width, height = decode_image(row).size
                    key = key_of(row)
                    items.setdefault(key, vars(Item(key, number, position, name, width, height)))
                except Exception as error:  # decoders raise many types
                    quarantined.append({"name": name, "reason": str(error) or type(error).__name__})
                position += 1
        if not items:
            raise ValueError(f"The dataset has no image that can be read: {quarantined[:1]}.")
        plan = {"inputs": inputs, "items": list(items.values()), "quarantined": quarantined}
        write_atomically(self.folder / ITEMS, json.dumps(plan, indent=1) + "\n")
        return plan

    def item(self, key: str) -> Item:
        """Raises ValueError where there is none."""
        if key not in self.items:
            raise ValueError(f"There is no image {key!r:.100} in this queue.")
        return self.items[key]

    def row(self, key: str) -> Row:
        """The row of an image."""
        item = self.item(key)
        with self._lock:
            if key not in self._rows:
                self._rows[key] = rows_at(self.shards, [(item.shard, item.position)])[item.shard, item.position]
                if len(self._rows) > KEPT:
                    self._rows.popitem(last=False)
            return self._rows[key]

    def image(self, key: str) -> Image.Image:
        """The image as every stage sees it: RGB, upright."""
        return decode_image(self.row(key))

    def suggestion(self, key: str) -> np.ndarray | None:
        """uint8 (H, W) at the image's size, 255 = 1.0: what the detector thinks, or the row's own map; None without either."""
        item = self.item(key)
        size = (item.width, item.height)
        if self.suggest is None:
            found = decode_map(self.row(key), size)
            if found is None:
                return None
            return np.array(found if found.size == size else found.resize(size, Image.Resampling.BILINEAR))
        path = self.folder / SUGGESTIONS / f"{key}.png"
        with self._suggesting:  # a detector takes its time; others go on painting
            if path.is_file():
                with Image.open(path, formats=("PNG",)) as image:
                    return np.array(image)
            made = self.suggest(self.image(key))
            if made.dtype != np.uint8 or made.shape != (item.height, item.width):
                raise ValueError(f"The detector's map is {made.dtype} {made.shape}, the image {size[::-1]}.")
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, encode_png(made)["bytes"])
            return made

    # --- loans -------------------------------------------------------------------------------------------------------------

    def claim(self, annotator: str, page: str, key: str | None = None) -> dict[str, Any] | None:
        """Lend an image to a page: the one it has, one that the annotator has begun, or the next that nobody has.

        Args:
            annotator: a name, of which many pages may be open.
            page: a random text that a page keeps when it is reloaded.
            key: an image that this annotator has finished or skipped and wants to see again.

        Returns:
            `key`, `loan` (the token), `width`, `height`, `name`, `prompt`, `category`, `kinds`, `state`, `revision`, `seconds`; None
            where nothing is left for this annotator.

        Raises:
            Refused: `key` is lent to another page.
            ValueError: a name that cannot be used, or no such image.
        """
        annotation_path(self.folder, "0" * KEY_LENGTH, annotator)  # says what a name must be
        annotator = annotator.lower()
        with self._lock:
            now = self.clock()
            # those of other pages, and of this page under another name
            lent = {
                k
                for k, loan in self._loans.items()
                if loan["until"] > now and (loan["page"] != page or loan["annotator"] != annotator)
            }
            mine = {k for k, loan in self._loans.items() if loan["page"] == page and loan["annotator"] == annotator}
            if key is not None:
                self.item(key)
                if key in lent:
                    raise Refused("Somebody else has this image now.")
            else:
                key = self._next(annotator, lent, mine)
                if key is None:
                    return None
            # a loan that ran out stays good until the image is lent to another, or its page takes another
            self._loans = {k: loan for k, loan in self._loans.items() if k != key and loan["page"] != page}
            token = secrets.token_hex(16)
            self._loans[key] = {"annotator": annotator, "page": page, "token": token, "until": now + self.loan_seconds}
            self._save_loans()
            item, row = self.items[key], self.row(key)
            annotation = self.annotation(key, annotator)
            return {
                "key": key,
                "loan": token,
                "width": item.width,
                "height": item.height,
                "name": item.name,
                "prompt": row["prompt"],
                "category": row["category"],
                "kinds": list(annotation.kinds) if annotation else [],
                "state": annotation.state if annotation else None,
                "revision": annotation.revision if annotation else 0,
                "seconds": annotation.seconds if annotation else 0.0,
            }

    def _next(self, annotator: str, lent: set[str], mine: set[str]) -> str | None:
        """The image that the page has, be it a finished one that is amended; else one that is begun, or new."""
        open_to_me = [
            key
            for key in self.items
            if key not in lent
            and self._found[key].get(annotator, DRAFT) == DRAFT
            and (self._wanted(key) or annotator in self._found[key])
        ]
        begun = [key for key in open_to_me if annotator in self._found[key]]
        return next((key for key in (*(k for k in self.items if k in mine), *begun, *open_to_me)), None)

    def _wanted(self, key: str) -> bool:
        """Whether more annotators are to finish the image. Another's unfinished one does not count: they may never come back."""
        return sum(state == DONE for state in self._found[key].values()) < self.copies

    def renew(self, key: str, token: str) -> None:
        """The page is still there. Raises [`Refused`] where the loan is another's by now."""
        with self._lock:
            self._held(key, token)["until"] = self.clock() + self.loan_seconds
            self._save_loans()

    def _held(self, key: str, token: str) -> dict[str, Any]:
        """A loan that ran out is good as long as nobody else got the image."""
        self.item(key)
        loan = self._loans.get(key)
        if loan is None or not secrets.compare_digest(loan["token"].encode(), token.encode()):
            raise Refused("This image was opened elsewhere since: in another tab, or by another annotator.")
        return loan

    def _save_loans(self) -> None:
        write_atomically(self.folder / LOANS, json.dumps(self._loans))

    # --- annotations ---------------------------------------------------------------------------------------------------------

    def annotation(self, key: str, annotator: str) -> Annotation | None:
        """What the annotator has painted on the image so far."""
        self.item(key)
        try:
            return read_annotation(annotation_path(self.folder, key, annotator))
        except FileNotFoundError:
            return None

    def first_layer(self, key: str) -> np.ndarray:
        """The mask that an annotator begins with: where the suggestion's confidence is at least a half."""
        item, suggestion = self.item(key), self.suggestion(key)
        if suggestion is None:
            return np.zeros((item.height, item.width), np.uint8)
        return np.where(suggestion >= round(255 * SUGGESTED), ARTIFACT, 0).astype(np.uint8)

    def save(
        self,
        key: str,
        token: str,
        mask: np.ndarray,
        state: str = DRAFT,
        kinds: Sequence[str] = (),
        seconds: float = 0.0,
    ) -> int:
        """Write what the page that has the image painted; it is on the disk when this returns. A finished one is given back.

        A draft of a mask that is finished already amends it: it stays finished, and the page keeps the image.

        Args:
            key, token: of the loan.
            mask: uint8 (H, W), see [`Annotation`].
            state: "draft", "done" or "skipped".
            kinds: of artifact, of those of the queue.
            seconds: spent on the image so far.

        Returns:
            The revision.

        Raises:
            Refused: the image is another page's by now.
            ValueError: the mask has another size than the image, or an argument is out of range.
        """
        with self._lock:
            loan, item = self._held(key, token), self.items[key]
            if mask.shape != (item.height, item.width):
                raise ValueError(f"The mask is {mask.shape}, the image {(item.height, item.width)} (height, width).")
            if not set(kinds) <= set(self.kinds):
                raise ValueError(f"`kinds` must be of {', '.join(self.kinds)}, found {list(kinds)!r:.100}.")
            if not 0 <= seconds < 1e6:
                raise ValueError(f"`seconds` must lie in [0, 1e6), found {seconds}.")
            before = self.annotation(key, loan["annotator"])
            revision = (before.revision if before else 0) + 1
            kept = DONE if state == DRAFT and before is not None and before.state == DONE else state
            annotation = Annotation(mask, kept, tuple(dict.fromkeys(kinds)), revision, seconds)
            write_annotation(self.folder, key, loan["annotator"], annotation)
            self._found[key][loan["annotator"]] = kept
            if state == DRAFT:
                loan["until"] = self.clock() + self.loan_seconds
            else:
                del self._loans[key]
            self._save_loans()
            return revision

    # --- how far it is ---------------------------------------------------------------------------------------------------------

    def _on_disk(self, key: str) -> dict[str, str]:
        return {name: annotation.state for name, annotation in annotations_of(self.folder, key).items()}

    def progress(self, annotator: str | None = None) -> dict[str, Any]:
        """`images`; `finished` (by as many annotators as are wanted); `missing` (masks that are yet to be painted); `begun` (images
        with a draft); `annotators` (name -> finished and skipped); and of the annotator `yours`, the keys finished or skipped."""
        with self._lock:
            done = {key: sum(state == DONE for state in found.values()) for key, found in self._found.items()}
            people: dict[str, dict[str, int]] = {}
            for found in self._found.values():
                for name, state in found.items():
                    counts = people.setdefault(name, {DONE: 0, SKIPPED: 0, DRAFT: 0})
                    counts[state] += 1
            yours = [
                key for key, found in self._found.items() if annotator and found.get(annotator.lower(), DRAFT) != DRAFT
            ]
            return {
                "images": len(self.items),
                "copies": self.copies,
                "finished": sum(count >= self.copies for count in done.values()),
                "missing": sum(max(0, self.copies - count) for count in done.values()),
                "begun": sum(DRAFT in found.values() for found in self._found.values()),
                "annotators": dict(sorted(people.items())),
                "yours": yours,
            }

    def agreement(self) -> dict[tuple[str, str], tuple[int, float]]:
        """See [`data.annotate.agreement`]: reads the masks of the images that several have finished."""
        with self._lock:
            several = [key for key, f in self._found.items() if sum(state == DONE for state in f.values()) > 1]
        return agreement(list(annotations_of(self.folder, key).items()) for key in several)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}): remove it to begin anew.") from error
