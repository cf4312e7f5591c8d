"""Drawings take turns, in the order in which they were asked for, because PyTorch uses all processors for one of them."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from ddpm.errors import UserError

T = TypeVar("T")
LONGEST = 32  # drawings that wait
LOOK_SECONDS = 0.5  # between two looks whether a client that waits is still there


class Busy(UserError):
    """Too many drawings wait."""


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class Queue:
    def __init__(self) -> None:
        self.places: list[object] = []
        self.moved = asyncio.Event()  # when somebody leaves; then another one takes its place

    @contextmanager
    def place(self) -> Iterator[object]:
        """A place at the end of the queue, given up at the end of the `with` block. Raises Busy if the queue is full."""
        if len(self.places) > LONGEST:
            raise Busy(f"{LONGEST} drawings are waiting already; try again later")
        place = object()
        self.places.append(place)
        try:
            yield place
        finally:
            self.places.remove(place)
            self.moved.set()
            self.moved = asyncio.Event()

    async def ahead(self, place: object, http: Request) -> AsyncIterator[int]:
        """How many drawings come before this place, whenever that changes, until none does."""
        told = None
        while ahead := self.places.index(place):
            if ahead != told:
                yield (told := ahead)
            await _stays(http)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.moved.wait(), LOOK_SECONDS)

    @asynccontextmanager
    async def turn(self, http: Request) -> AsyncIterator[None]:
        """Our turn, once it comes, for those who needn't know how many are ahead."""
        with self.place() as place:
            async for _ in self.ahead(place, http):
                pass
            yield


async def worked_off(items: Iterator[T], http: Request) -> AsyncIterator[T]:
    """The items, each made in another thread. Raises ClientLeft, and makes no more of them, once the client has left."""
    while True:
        await _stays(http)
        item = await run_in_threadpool(next, items, None)
        if item is None:
            return
        yield item


async def _stays(http: Request) -> None:
    if await http.is_disconnected():
        raise ClientLeft
