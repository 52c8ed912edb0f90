# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""How much may be spent on answers: requests, tokens and money."""

import threading
from dataclasses import dataclass, field

from .cache import AnswerCache
from .client import Answer, Request


MILLION = 10**6


class BudgetSpent(RuntimeError):
    """The next request might cost more than is left."""


@dataclass
class Budget:
    """Limits for all runs that share a cache: a run that goes on, or is done again, has what the earlier ones left.

    A request is sent if it fits even when its answer is as long as it may be and its question as long as the longest so far, as
    do those under way. What a question really costs is known from the answer alone, so that a first one of unusual length can go
    over the limit. Processes that ask at the same time know of each other what was answered, and not what is under way.

    Args:
        requests, tokens, money: limits; None is no limit. Retries are requests. Tokens are those in and out.
        price_in, price_out: of a million tokens, in the currency of `money`.
    """

    requests: int | None = None
    tokens: int | None = None
    money: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _reserved: list[int] = field(default_factory=lambda: [0, 0, 0], repr=False)  # requests, tokens in, tokens out
    _longest: int = field(default=0, repr=False)

    def __post_init__(self):
        for name in ("requests", "tokens", "money", "price_in", "price_out"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}` must be at least 0, found {value}.")
        if self.money is not None and not (self.price_in or self.price_out):
            raise ValueError(
                "`money` limits nothing without prices: give `price_in` and `price_out`, for a million tokens."
            )

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.price_in + tokens_out * self.price_out) / MILLION

    def reserve(self, request: Request, cache: AnswerCache) -> tuple[int, int]:
        """Take what one request may cost, for [`settle`]. Raises [`BudgetSpent`] where it is not left."""
        with self._lock:
            requests, tokens_in, tokens_out, money = cache.spent()
            may = (self._longest, request.most_tokens)
            ahead = [held + more for held, more in zip(self._reserved, (1, *may))]
            would = {
                "requests": (self.requests, requests + ahead[0], requests),
                "tokens": (self.tokens, tokens_in + tokens_out + ahead[1] + ahead[2], tokens_in + tokens_out),
                "money": (self.money, money + self.cost(ahead[1], ahead[2]), money),
            }
            for name, (limit, total, spent) in would.items():
                if limit is not None and total > limit * (1 + 1e-9):
                    raise BudgetSpent(
                        f"The budget of {name} is spent: {spent:.6g} of {limit:g}, besides requests under way, and the next may not fit. Answers are "
                        f"kept: raise the limit and run the same command again."
                    )
            self._reserved = ahead
            return may

    def settle(self, may: tuple[int, int], model: str, answer: Answer | None, cache: AnswerCache) -> None:
        """Give back what was taken, and count what was used; without an answer, the request alone."""
        tokens_in, tokens_out = (answer.tokens_in, answer.tokens_out) if answer else (0, 0)
        with self._lock:
            self._longest = max(self._longest, tokens_in)
            self._reserved = [held - less for held, less in zip(self._reserved, (1, *may))]
            cache.add_spent(model, 1, tokens_in, tokens_out, self.cost(tokens_in, tokens_out))
