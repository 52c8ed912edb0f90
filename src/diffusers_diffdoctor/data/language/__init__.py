# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Talking to language models: one way to ask, whatever answers.

`client` says what a request is and asks an endpoint, `local` asks a model of transformers, `cache` keeps every answer, `budget` stops
before too much is spent, and `asking` puts them together: concurrency, retries, each question once.
"""

from .asking import Asker
from .budget import Budget, BudgetSpent
from .cache import AnswerCache
from .client import Answer, Endpoint, NoAnswer, Refused, Request


__all__ = ["Answer", "AnswerCache", "Asker", "Budget", "BudgetSpent", "Endpoint", "NoAnswer", "Refused", "Request"]
