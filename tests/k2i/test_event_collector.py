"""Which namespace a process belongs to, and its pid there: decided from what /proc would say."""

from tabane.k2i.event_collector import Place, Places, parse_pids
from tabane.k2i.events import Told

NODE, OTHER, INNER, MACHINE = 100, 200, 300, 1


class Machine:
    """Processes by the machine's pid: their pids from the top, their namespaces from below."""

    def __init__(self) -> None:
        self.pids: dict[int, tuple[int, ...]] = {1: (1,), 50: (50, 1), 60: (60, 1)}
        self.spaces: dict[int, tuple[int, ...]] = {50: (NODE, MACHINE), 60: (OTHER, MACHINE)}
        self.places = Places(
            lambda pid: self.pids.get(pid, ()), lambda pid: self.spaces.get(pid, ())
        )
        self.places.add(NODE, 1, self.pids)
        self.places.add(OTHER, 1, self.pids)

    def tell(self, kind: str, pid: int, parent: int = 0) -> tuple[Place, int | None] | None:
        return self.places.take(Told(kind, pid=pid, parent=parent))


def test_a_child_is_where_its_parent_is() -> None:
    machine = Machine()
    machine.pids[51] = (51, 2)
    assert machine.tell("fork", 51, 50) == (Place(NODE, 2), 1)
    assert machine.tell("exec", 51) == (Place(NODE, 2), None)
    assert machine.tell("exit", 51, 50) == (Place(NODE, 2), 1)
    assert machine.tell("exit", 51, 50) is None


def test_a_container_within_is_told_with_the_pids_of_the_node() -> None:
    machine = Machine()
    machine.pids[51] = (51, 2, 1)
    machine.pids[52] = (52, 3, 2)
    assert machine.tell("fork", 51, 50) == (Place(NODE, 2), 1)
    assert machine.tell("fork", 52, 51) == (Place(NODE, 3), 2)


def test_one_that_was_reaped_before_is_its_parents_without_a_pid() -> None:
    machine = Machine()
    assert machine.tell("fork", 51, 50) == (Place(NODE, None), 1)
    assert machine.tell("exec", 51) == (Place(NODE, None), None)
    assert machine.tell("exit", 51, 50) == (Place(NODE, None), 1)


def test_a_parent_that_was_quicker_to_reap_is_remembered() -> None:
    """The kernel tells an end without it then."""
    machine = Machine()
    machine.pids[51] = (51, 2)
    assert machine.tell("fork", 51, 50) == (Place(NODE, 2), 1)
    assert machine.tell("exit", 51, 0) == (Place(NODE, 2), 1)
    assert machine.tell("fork", 51, 50) == (Place(NODE, 2), 1)


def test_a_pid_that_is_learnt_late() -> None:
    machine = Machine()
    machine.tell("fork", 51, 50)
    machine.pids[51] = (51, 2)
    assert machine.tell("exec", 51) == (Place(NODE, 2), None)
    assert machine.tell("exit", 51, 50) == (Place(NODE, 2), 1)


def test_one_who_entered_from_outside_is_of_the_namespace() -> None:
    machine = Machine()
    machine.pids[70] = (70, 9)
    machine.spaces[70] = (NODE, MACHINE)
    assert machine.tell("fork", 70, 1) == (Place(NODE, 9), None)
    machine.pids[71] = (71, 10, 4)
    machine.spaces[71] = (INNER, NODE, MACHINE)
    assert machine.tell("fork", 71, 1) == (Place(NODE, 10), None)


def test_others_are_nobodys() -> None:
    machine = Machine()
    machine.pids[70] = (70,)
    assert machine.tell("fork", 70, 1) is None
    assert machine.tell("exec", 70) is None
    machine.pids[71] = (71, 4)
    machine.spaces[71] = (INNER, MACHINE)
    assert machine.tell("fork", 71, 1) is None
    assert machine.tell("exit", 71, 1) is None


def test_a_pid_that_is_used_again_elsewhere() -> None:
    machine = Machine()
    machine.pids[51] = (51, 2)
    machine.tell("fork", 51, 50)
    machine.pids[51] = (51, 3)
    assert machine.tell("fork", 51, 60) == (Place(OTHER, 3), 1)
    machine.pids[51] = (51,)
    assert machine.tell("fork", 51, 1) is None
    assert machine.tell("exit", 51, 1) is None


def test_who_left_is_told_nothing_more() -> None:
    machine = Machine()
    machine.places.remove(NODE)
    machine.pids[51] = (51, 2)
    machine.spaces[51] = (NODE, MACHINE)
    assert machine.tell("fork", 51, 50) is None
    assert machine.tell("exit", 60, 1) == (Place(OTHER, 1), None)


def test_numbers_that_were_given_back_are_none() -> None:
    """While a process is being reaped its status has zeros in their place."""
    assert parse_pids(b"Name:\tsh\nNSpid:\t4711\t3\nNSpgid:\t1\t1\n") == (4711, 3)
    assert parse_pids(b"Name:\tsh\nNSpid:\t4711\t0\nNSpgid:\t0\t0\n") == ()
    assert parse_pids(b"Name:\tsh\n") == ()
