# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The pages: paint masks, look at diagnoses, compare folders. `diffdoctor ui` serves them; they need the extra `ui`.

`queue` knows who paints what and needs no server; `server` is what the page of `page/` asks; `application` puts the pages together.
"""

from .queue import Queue


__all__ = ["Queue"]
