"""Bulk stores: copies from shared to global memory, and additions there, that a thread starts and counts in groups.

The copy engine reads shared memory until the thread has waited for the group (wait_group.read is enough). What it
writes is there, at the latest, when the thread has waited without .read, or the block has ended; until then the machine
lets it land when it likes: in lock step as late as possible, with a seed at random.
"""

from dataclasses import dataclass

import numpy as np

from .errors import AsyncHazard
from .numerics import bf16_to_f32, f32_to_bf16
from .ptx import TYPES


def _add(kind):
    """A function (old, new) -> sum, on bytes."""
    if kind == "bf16":
        return lambda old, new: f32_to_bf16(bf16_to_f32(old.view("u2")) + bf16_to_f32(new.view("u2")))
    return lambda old, new: old.view(TYPES[kind]) + new.view(TYPES[kind])


@dataclass(eq=False)
class BulkStore:
    """One store in flight: `data` (a row of 16 bytes per place) goes to `places` of global memory."""

    inst: object
    block: int
    thread: int  # of its team
    offsets: np.ndarray  # in shared memory
    number: int  # of the race detector
    places: np.ndarray
    data: np.ndarray
    adds: str | None  # the type of what is added, None where it is stored
    is_read: bool = False
    has_landed: bool = False


class BulkStores:
    """Those of one batch of blocks."""

    def __init__(self, batch):
        self._batch = batch
        self._groups = {}  # thread of the batch -> groups, the newest is open until it is committed

    def issue(self, team, store):
        self._groups.setdefault(int(team.thread[store.thread]), [[]])[-1].append(store)

    def commit(self, team, threads):
        for thread in team.thread[threads].tolist() if self._groups else ():
            if thread in self._groups:
                self._groups[thread].append([])

    def wait(self, team, threads, pending, only_read):
        """All but the newest `pending` committed groups of each thread are done, or at least read."""
        for thread, number in zip(team.thread[threads].tolist(), threads.tolist()) if self._groups else ():
            groups = self._groups.get(thread, [])
            for group in groups[: max(len(groups) - 1 - pending, 0)]:
                for store in group:
                    self._end_reading(team, store, number)
                    if not only_read:
                        self._land(store)
            if not only_read and groups:
                self._groups[thread] = groups[max(len(groups) - 1 - pending, 0) :]

    def _end_reading(self, team, store, thread):
        if not store.is_read:
            store.is_read = True
            team.races.end_bulk_read(team, store.inst, store.number, store.offsets, store.data.shape[1], thread)

    def _land(self, store):
        if store.has_landed:
            return
        store.has_landed = True
        memory, data = self._batch.launch.memory, store.data
        if store.adds:
            old = memory.load(store.places, 1, data.shape[1])
            data = np.ascontiguousarray(_add(store.adds)(old, data)).view(np.uint8).reshape(data.shape)
        memory.store(store.places, data, 1, data.shape[1])

    def _all(self):
        return [store for groups in self._groups.values() for group in groups for store in group]

    def land_some(self, schedule):
        """Each store in flight lands or not, as the schedule has it, in any order."""
        stores = [store for store in self._all() if not store.has_landed]
        for i in schedule.permutation(len(stores)):
            if schedule.random() < 0.3:
                self._land(stores[i])

    def finish(self):
        """The blocks have ended. Raises AsyncHazard where the copy engine may still read their shared memory."""
        for store in self._all():
            if not store.is_read:
                what = "the block ended while this bulk store may still read its shared memory: its wait is missing"
                error = AsyncHazard(what, block=self._batch.coordinates[store.block])
                raise error.locate(self._batch.program.kernel, store.inst)
            self._land(store)
