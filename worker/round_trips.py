"""Round trips to Redis that are shared: what threads ask for meanwhile is asked together in the next."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Together(Generic[Asked, Answer]):
    """Calls of many threads: the first that has its turn asks for all that wait, by `ask`, and the others are answered.

    An answer that is an exception is raised in the thread that asked; what `ask` itself raises, in each.
    """

    def __init__(self, ask: Callable[[Sequence[Asked]], Sequence[Answer | Exception]]) -> None:
        self._ask = ask
        self._waiting: list[tuple[Asked, Future[Answer]]] = []
        self._adding, self._turn = threading.Lock(), threading.Lock()

    def __call__(self, asked: Asked) -> Answer:
        mine: Future[Answer] = Future()
        with self._adding:
            self._waiting.append((asked, mine))
        with self._turn:
            if not mine.done():
                self._answer_all()
        return mine.result()

    def _answer_all(self) -> None:
        with self._adding:
            waiting, self._waiting = self._waiting, []
        try:
            answers = self._ask([asked for asked, _ in waiting])
        except Exception as error:
            answers = [error] * len(waiting)
        for (_, future), answer in zip(waiting, answers, strict=True):
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
