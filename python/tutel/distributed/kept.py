"""What is made once for a group of ranks and ends with it: its divisions, and the groups that they consist of.

Groups are named here, not by torch.distributed. Its names of groups that only their members make hold a count of what
this process has made so far; ranks that made different groups before would give a new one different names, and wait for
each other in vain. And as groups made here do not count there, a program's own groups keep the names they would have.
"""

import datetime
import hashlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import distributed
from torch.distributed import distributed_c10d

from tutel import env
from tutel.distributed.start import initialized

#: A process group; None is the group of all ranks.
Group = Any

T = TypeVar("T")

#: What was made for the present start of torch.distributed: by kind, parent and further arguments.
_made: dict[tuple[str, Group, object], Any] = {}
_made_for: Callable[[], Any] | None = None
#: The groups made of ranks of a parent.
_children: dict[Group, list[Group]] = {}
#: The least number that no group of this process has in its name. Restarts go on counting: the store may be the same.
_next_number = 0


def once(kind: str, parent: Group, key: object, make: Callable[[], T]) -> T:
    """Return what was made before for the same arguments, as long as the parent exists.

    Raises:
        ValueError: If the parent was destroyed.
    """
    _forget_ended()
    if not _exists(parent):
        raise ValueError(f"there is no group {parent!r}: it was destroyed")
    if (kind, parent, key) not in _made:
        _made[kind, parent, key] = make()
    made: T = _made[kind, parent, key]
    return made


def next_number() -> int:
    """Return the least number that this process could give to a new group; the ranks' largest is free on all."""
    return _next_number


def new_group(members: list[int], parent: Group, number: int, *, everywhere: bool = False) -> Group:
    """Make a group of ranks of a parent.

    Args:
        members: Ranks among all.
        parent: The group that the new one ends with.
        number: Which groups of the same members do not share; the same on all members, and at least
            :func:`next_number` on each.
        everywhere: Whether all ranks of the world call this, instead of the members only.
    """
    global _next_number
    _next_number = max(_next_number, number + 1)
    # Without a timeout a new group takes torch's default, not its parent's.
    timeout = datetime.timedelta(seconds=env.global_timeout())
    # Only parents of a torch that leaves ranks in their order can have another one than that of their numbers.
    order: dict[str, Any] = {} if members == sorted(members) else {"sort_ranks": False}
    with _named(members, number):
        group = distributed.new_group(members, timeout=timeout, use_local_synchronization=not everywhere, **order)
    if group is not distributed.GroupMember.NON_GROUP_MEMBER:
        _children.setdefault(parent, []).append(group)
    return group


@contextmanager
def _named(members: list[int], number: int) -> Iterator[None]:
    """Let torch.distributed give a new group our name; there is no public way to choose it."""
    # Groups of one store must not share a name, and blocks of one division have the same number.
    name = f"tutel_{number}_{hashlib.sha256(repr(members).encode()).hexdigest()[:32]}"
    usual = distributed_c10d._process_group_name

    def choose(ranks: Any, *args: Any, **kwargs: Any) -> Any:
        return name if list(ranks) == members else usual(ranks, *args, **kwargs)

    distributed_c10d._process_group_name = choose
    try:
        yield
    finally:
        distributed_c10d._process_group_name = usual


def destroy_group(group: Group) -> None:
    """Destroy a group that the program made, and all groups that it was divided into; every member calls this.

    After ``torch.distributed.destroy_process_group`` those would live on until something else is divided.

    Args:
        group: A part of all ranks. Nothing happens on ranks that are no members.

    Raises:
        TypeError: If it is no group.
        ValueError: If it is that of all ranks, or was destroyed before.
    """
    check_group("group", group)
    if group is distributed.GroupMember.NON_GROUP_MEMBER:
        return
    if group is None or (initialized() and group is distributed.group.WORLD):
        raise ValueError(f"group must be a part of all ranks, got {group!r}: stop() ends the group of all")
    _forget_ended()
    if not _exists(group):
        raise ValueError(f"there is no group {group!r}: it was destroyed")
    _end_children(group)
    distributed.destroy_process_group(group)


def check_group(name: str, group: Group) -> None:
    """Check that an argument is a process group, or None.

    Raises:
        TypeError: If it is anything else.
    """
    if group is None or not distributed.is_available():
        return
    if isinstance(group, distributed.ProcessGroup) or group is distributed.GroupMember.NON_GROUP_MEMBER:
        return
    hint = "; pass mesh.get_group(), the group of one of its dimensions" if hasattr(group, "get_group") else ""
    raise TypeError(f"{name} must be a process group of torch.distributed or None, got {type(group).__name__}{hint}")


def _forget_ended() -> None:
    """Destroy what is left of groups that were destroyed, and forget all that belongs to an earlier start."""
    global _made_for
    world = distributed.group.WORLD if initialized() else None
    if (_made_for() if _made_for else None) is not world:
        _made.clear()
        _children.clear()
        _made_for = None if world is None else weakref.ref(world)
    for parent in dict.fromkeys([*_children, *(parent for _, parent, _ in _made)]):  # in the same order on all ranks
        if not _exists(parent):
            _end_children(parent)


def _end_children(parent: Group) -> None:
    for child in reversed(_children.pop(parent, [])):
        _end_children(child)
        if _exists(child):  # the program may have destroyed it
            distributed.destroy_process_group(child)
    for key in [key for key in _made if key[1] is parent]:
        del _made[key]


def _exists(group: Group) -> bool:
    """Whether a group was not destroyed; that of all ranks, None, exists as far as this module is asked."""
    if group is None:
        return True
    if not initialized():
        return False
    try:
        distributed.get_process_group_ranks(group)
    except KeyError:
        return False
    return True
