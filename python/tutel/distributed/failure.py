"""What a rank says when others fail: which rank, in which stage, and why.

A collective that fails knows only that a connection broke, or that time is up. The store in which processes met tells
the rest. Each process has a thread that sleeps there until somebody fails; then it answers for its process, even while
that waits in a collective, and hears what others report. So a rank that fails can tell ranks that live from those that
do not answer, and quote those that raised an error; and what was heard stays known when the store ends with its host.

    rank that fails: reports, wakes all -> waits until the others answered, at most PATIENCE -> raises RankError
    other ranks:     listener hears the report, answers -> their own collective fails -> they do the same
"""

import atexit
import contextlib
import dataclasses
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, distributed

#: How long a failing rank waits for the others' answers, in seconds.
PATIENCE = 5.0
#: How long the rank that holds the store stays, for others to hear what it reported last.
_LINGER = 2.0
#: How often a listener looks again, once somebody has failed.
_INTERVAL = 0.05
#: How much of another rank's message is quoted.
_QUOTED = 600


class RankError(RuntimeError):
    """A stage in which ranks work together failed.

    Attributes:
        rank: The rank that says so, among all.
        stage: What it was doing, or None outside of any stage.
        silent: Ranks that did not answer: killed, ended, or cut off.
        reports: What other ranks reported, by rank.
    """

    def __init__(
        self,
        message: str,
        rank: int,
        stage: str | None,
        silent: Sequence[int] = (),
        reports: dict[int, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.stage = stage
        self.silent = tuple(silent)
        self.reports = dict(reports or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.rank, self.stage, self.silent, self.reports)


class stage:  # noqa: N801  (reads as the statement that it is)
    """``with stage("exchange of rows", group):`` turns a collective's failure inside into a RankError.

    Args:
        name: What the ranks do together.
        group: The ranks; None means all.
        tensors: What this rank brings, for the other ranks' messages.

    Raises:
        RankError: Instead of the errors that torch.distributed raises. Others pass.
    """

    __slots__ = ("before", "group", "name", "tensors")

    def __init__(self, name: str, group: Any = None, *tensors: Tensor) -> None:
        self.name, self.group, self.tensors = name, group, tensors

    def __enter__(self) -> "stage":
        global _here
        self.before, _here = _here, self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        global _here
        try:
            # Collectives raise RuntimeError itself, or DistError; its other subclasses mean other things.
            if kind is RuntimeError or isinstance(error, distributed.DistError):
                raise explain(self.name, self.group, str(error)) from error
        finally:
            _here = self.before

    def __str__(self) -> str:
        return f"{self.name} of {', '.join(map(describe, self.tensors))}" if self.tensors else self.name


#: What this process is doing together with others.
_here: stage | None = None
_watch: "Watch | None" = None
_failed = False


def describe(tensor: Tensor) -> str:
    """Write a tensor's dtype and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def listen(store: Any, rank: int, world_size: int, *, held_by_rank: bool = True) -> None:
    """Begin to hear what other ranks report, and report this process's uncaught errors.

    Args:
        store: A store of torch.distributed that all ranks share.
        rank: This rank among all.
        world_size: How many there are.
        held_by_rank: Whether the store ends with rank 0; else it is the launcher's.
    """
    global _watch
    silence()
    _watch = Watch(store, rank, world_size, held_by_rank)
    if sys.excepthook is not _report_uncaught:
        _hooks.append(sys.excepthook)
        sys.excepthook = _report_uncaught


def silence() -> None:
    """Stop listening."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


def report(error: BaseException) -> None:
    """Tell the other ranks of an error that ends this process, so that they can quote it."""
    if _watch is not None and not isinstance(error, RankError):  # which was told when it was made
        _watch.tell(f"raised {type(error).__name__}: {error}"[:_QUOTED])


def explain(name: str, group: Any, cause: str) -> RankError:
    """Ask the other ranks of a group why a stage failed.

    Returns:
        The error to raise: it names this rank, the stage, and the ranks that failed or did not answer.
    """
    if _watch is None:
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        return RankError(f"rank {rank}: {name} failed: {cause}", rank, name)
    members = range(_watch.world_size) if group is None else distributed.get_process_group_ranks(group)
    return _watch.explain(name, [rank for rank in members if rank != _watch.rank], cause)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a rank told the others.

    Attributes:
        rank: Who.
        text: What happened to it.
        silent: Ranks that did not answer it.
    """

    rank: int
    text: str
    silent: tuple[int, ...] = ()


class Watch:
    """A rank's ear at the store, and its voice there.

    Keys: ``reports``, how many there are; ``report/i``; ``wake/r``, which rank r's listener sleeps for; ``answer/r``,
    in which it says what rank r is doing; ``heard/r``, how many reports it has heard; ``done/r``, set by a rank that
    knows why it failed; ``end/r``, set by one that ends as it should.

    Args:
        store: Shared by all ranks.
        rank: This rank.
        world_size: How many there are.
        held_by_rank: Whether the store ends with rank 0.
    """

    def __init__(self, store: Any, rank: int, world_size: int, held_by_rank: bool) -> None:
        self.rank, self.world_size, self._held_by_rank = rank, world_size, held_by_rank
        self.heard: dict[int, Report] = {}
        # Clients serve one call at a time: the one that sleeps is the listener's own.
        self._store, self._ear = store, store.clone()
        self._stopped = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="tutel-listener", daemon=True)
        self._thread.start()

    def tell(self, text: str) -> None:
        """Report, wake all listeners, and wait until they heard it if the store ends with this process."""

        def talk() -> None:
            self._write(Report(self.rank, text))
            self._linger([rank for rank in range(self.world_size) if rank != self.rank])

        self._in_time(talk)

    def explain(self, name: str, members: Sequence[int], cause: str) -> RankError:
        """Report a failed stage and ask members what happened to them; see :func:`explain`."""
        doing: dict[int, str] = {}
        ended: list[int] = []
        silent: list[int] = []

        def talk() -> None:
            self._write(Report(self.rank, f"failed in {name}"))
            silent.extend(self._await_answers(members))
            for rank in members:
                if self._store.check([f"end/{rank}"]):
                    ended.append(rank)
                elif self._store.check([f"answer/{rank}"]):
                    doing[rank] = self._store.get(f"answer/{rank}").decode()
            if silent:
                self._write(Report(self.rank, f"failed in {name}", tuple(silent)))
            self._store.set(f"done/{self.rank}", "")
            self._linger([rank for rank in members if rank not in silent])

        reachable = self._in_time(talk)
        reports = {rank: report.text for rank, report in sorted(self.heard.items()) if rank in members}
        gone = {*silent, *(rank for report in self.heard.values() for rank in report.silent)} - {*ended}
        if not reachable and self._held_by_rank and 0 not in self.heard:
            gone.add(0)
        lines = [f"{ranks_as_words(sorted(gone))} did not answer (killed, stuck or cut off)"] if gone else []
        lines += [f"{ranks_as_words(ended)} ended the program before"] if ended else []
        # Those that raised an error come before those that only noticed it.
        lines += [
            f"rank {rank} {reports[rank]}"
            for rank in sorted(reports, key=lambda r: not reports[r].startswith("raised"))
        ]
        lines += [f"rank {rank} is {where}" for rank, where in doing.items() if rank not in reports]
        if not reachable:
            holder = "rank 0" if self._held_by_rank else "the launcher"
            lines.append(f"the store where the ranks met does not answer, {holder} held it")
        text = f"rank {self.rank} of {self.world_size}: {name} failed: {'; '.join(lines)}. Cause: {cause}"
        return RankError(text, self.rank, name, sorted(gone), reports)

    def stop(self) -> None:
        """End the listener; the process ends as it should."""

        def talk() -> None:
            self._store.set(f"end/{self.rank}", "")
            self._store.set(f"wake/{self.rank}", "")

        self._stopped = True
        if self._in_time(talk):
            self._thread.join(PATIENCE)

    def _write(self, report: Report) -> None:
        number = self._store.add("reports", 1)
        self._store.set(f"report/{number}", json.dumps(dataclasses.asdict(report)))
        for rank in range(self.world_size):
            self._store.set(f"wake/{rank}", "")

    def _await_answers(self, members: Sequence[int]) -> list[int]:
        """Return who did not answer in time, did not report, and is not known to be silent or to have ended."""
        until = time.monotonic() + PATIENCE
        missing = list(members)
        while True:
            self._hear(self._store)
            known = {*self.heard, *(rank for report in self.heard.values() for rank in report.silent)}
            missing = [r for r in missing if r not in known and not self._store.check([f"answer/{r}"])]
            missing = [r for r in missing if not self._store.check([f"end/{r}"])]
            if not missing or time.monotonic() > until:
                return missing
            time.sleep(_INTERVAL)

    def _linger(self, members: Sequence[int]) -> None:
        """Stay until members heard all reports, if the store ends with this process."""
        if not self._held_by_rank or self.rank != 0:
            return
        until = time.monotonic() + _LINGER
        count = self._store.add("reports", 0)
        while members and time.monotonic() < until:
            members = [rank for rank in members if self._store.add(f"heard/{rank}", 0) < count]
            members = [rank for rank in members if not self._store.check([f"done/{rank}"])]
            time.sleep(_INTERVAL)

    def _hear(self, store: Any) -> int:
        """Read all reports; return how many there are, without one that is being written."""
        with self._lock:
            count: int = store.add("reports", 0)
            for number in range(1, count + 1):
                # The number is taken before the report is written: it will be there the next time.
                if not store.check([f"report/{number}"]):
                    return number - 1
                entry = json.loads(store.get(f"report/{number}"))
                told = Report(entry["rank"], entry["text"], tuple(entry["silent"]))
                if told.rank != self.rank:
                    self.heard[told.rank] = told
            return count

    def _listen(self) -> None:
        # The store ends with its host, and what was heard stays.
        with contextlib.suppress(RuntimeError):
            while not self._stopped:
                try:
                    self._ear.wait([f"wake/{self.rank}"], datetime.timedelta(days=1))
                except distributed.DistStoreError:
                    continue  # a day without failures
                break
            heard = 0
            while not self._stopped:
                count = self._hear(self._ear)
                self._ear.add(f"heard/{self.rank}", count - heard)
                heard = count
                self._ear.set(f"answer/{self.rank}", f"in {_here}" if _here else "not in a collective")
                time.sleep(_INTERVAL)

    def _in_time(self, talk: Callable[[], None]) -> bool:
        """Talk to the store, but never longer than twice PATIENCE: its host may have been stopped, not ended.

        Returns:
            Whether the store answered.
        """
        done = []

        def run() -> None:
            with contextlib.suppress(RuntimeError):
                talk()
                done.append(True)

        thread = threading.Thread(target=run, name="tutel-report", daemon=True)
        thread.start()
        thread.join(2 * PATIENCE)
        return bool(done)


def has_failed() -> bool:
    """Whether an error ended this program."""
    return _failed


def ranks_as_words(ranks: Sequence[int]) -> str:
    """Write numbers of ranks as words."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


_hooks: list[Callable[..., Any]] = []


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    global _failed
    _hooks[-1](kind, error, trace)
    if hasattr(sys, "ps1"):  # an interactive session goes on
        return
    _failed = True
    if isinstance(error, distributed.DistError) or (kind is RuntimeError and "gloo" in str(error)):
        # A collective of somebody else, DistributedDataParallel for example, which knows nothing of stages.
        print(f"RankError: {explain('a collective', None, str(error))}", file=sys.stderr)
    else:
        report(error)


@atexit.register
def _end_at_once_after_failure() -> None:
    """End a failed process: destroying its groups would wait for collectives that never end."""
    if _failed:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(1)
