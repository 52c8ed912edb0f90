# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Ask many questions: several at a time, each once, again after a failure, none that was answered before."""

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from .budget import Budget
from .cache import AnswerCache
from .client import Answer, Client, NoAnswer, Refused, Request


AHEAD = 4  # questions that wait for each that is under way


@dataclass
class Asker:
    """A client with a memory, a budget and patience.

    Args:
        client: what answers.
        cache: every answer is kept here before it is given.
        budget: what may be spent.
        attempts: for one request, failures included; then the run stops, since the server is in trouble.
        readings: answers that `parse` may refuse before the last one is kept as it is.
        first_wait, longest_wait: seconds before the second attempt, doubled for each further one, and at most. A server that asks
            for a longer wait is given it.
    """

    client: Client
    cache: AnswerCache
    budget: Budget = field(default_factory=Budget)
    attempts: int = 8
    readings: int = 2
    first_wait: float = 1.0
    longest_wait: float = 60.0
    counts: Counter = field(default_factory=Counter)  # "asked", "cached", and failures by reason, of this run

    def __post_init__(self):
        if self.attempts < 1 or self.readings < 1:
            raise ValueError(
                f"`attempts` and `readings` must be at least 1, found {self.attempts} and {self.readings}."
            )
        self._lock = threading.Lock()
        self._under_way: dict[str, Future] = {}
        self._stopped = threading.Event()
        self._rest_until = 0.0  # when a server that asked all to wait may be asked again

    def ask_all(self, requests: Iterable[Request], parse: Callable[[str], Any]) -> Iterator[Answer]:
        """The answers in the order of the requests, which are read a little ahead.

        Args:
            requests: may have equals, which are asked once.
            parse: raises a ValueError for an answer that cannot be used.

        Raises:
            NoAnswer: none after `attempts`.
            BudgetSpent: nothing is left for the next request.
            ValueError: the server answers no request at all.
        """
        waiting: deque[Future] = deque()
        with ThreadPoolExecutor(self.client.concurrency) as pool:
            try:
                for request in requests:
                    waiting.append(self._submitted(pool, request, parse))
                    if len(waiting) >= AHEAD * self.client.concurrency:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BaseException:
                self._stopped.set()  # those under way are paid for: they end, and are kept
                for future in waiting:
                    future.cancel()
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                self._stopped.clear()
                self._under_way.clear()

    def _submitted(self, pool: ThreadPoolExecutor, request: Request, parse: Callable[[str], Any]) -> Future:
        key = request.key(self.client.model)
        with self._lock:
            if key not in self._under_way:
                known = self.cache.get(key)
                if known is not None:
                    self.counts["cached"] += 1
                    future: Future = Future()
                    future.set_result(known)
                    return future
                self._under_way[key] = pool.submit(self._answer, key, request, parse)
            return self._under_way[key]

    def _answer(self, key: str, request: Request, parse: Callable[[str], Any]) -> Answer:
        refused = 0
        for attempt in range(self.attempts):
            self._pause()
            # another seed for another reading: at one seed the same nonsense would come again
            asked = replace(request, seed=request.seed + refused)
            may = self.budget.reserve(asked, self.cache)
            answer, failure = None, None
            try:
                answer = self.client.ask(asked)
            except NoAnswer as error:
                failure = error
            except Refused as error:
                answer = Answer("", refused=str(error))
            finally:
                self.budget.settle(may, self.client.model, answer, self.cache)
                self._count("asked")
            if answer is not None:
                refused += not _can_be_read(answer, parse)
                if answer.refused or _can_be_read(answer, parse) or refused >= self.readings:
                    self.cache.put(key, self.client.model, answer)
                    return answer
                self._count("cannot be read")
                continue
            self._count(failure.reason)
            if attempt + 1 < self.attempts:
                self._wait(attempt, failure.wait)
        if answer is not None:
            self.cache.put(key, self.client.model, answer)
            return answer
        raise NoAnswer(
            f"{self.client.model!r} gave no answer in {self.attempts} attempts; the last one: {failure.reason}. Answers are kept: "
            "run the same command again when it is well."
        )

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _wait(self, attempt: int, asked_for: float) -> None:
        """After a failure: at least what the server asked for, which then holds for all."""
        wait = min(self.first_wait * 2**attempt, self.longest_wait) * random.uniform(0.5, 1.0)
        if asked_for:
            with self._lock:
                self._rest_until = max(self._rest_until, time.monotonic() + asked_for)
        self._sleep(wait)

    def _pause(self) -> None:
        self._sleep(self._rest_until - time.monotonic())

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(max(0.0, seconds)):
            raise NoAnswer("stopped")

    def line(self) -> str:
        """What this run asked, and what all runs with this cache have spent, in one line."""
        requests, tokens_in, tokens_out, money = self.cache.spent()
        failures = {name: n for name, n in self.counts.items() if name not in ("asked", "cached")}
        failed = f" ({', '.join(f'{name}: {n}' for name, n in failures.items())})" if failures else ""
        cost = f", {money:.4f} in money" if self.budget.price_in or self.budget.price_out else ""
        return (
            f"{self.counts['asked']} requests{failed}, {self.counts['cached']} answers from the cache; in all {requests} requests, "
            f"{tokens_in} tokens in and {tokens_out} out{cost}"
        )


def _can_be_read(answer: Answer, parse: Callable[[str], Any]) -> bool:
    try:
        parse(answer.text)
    except ValueError:
        return False
    return True
