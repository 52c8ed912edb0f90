# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The `diffdoctor` command: one thin module per sub-command, see `main.COMMANDS`."""
