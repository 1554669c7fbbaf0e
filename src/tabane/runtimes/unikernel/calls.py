"""The system calls that are left to the hosts of unikernels, by what a host is for.

`PROGRAM` and `HTTP` are of the host that runs a WebAssembly module, once it has started. It opens
no file, makes no socket, maps no memory and starts nothing, so they are few; any other ends it.
`COMPONENT` is of the wasmtime program, which needs to start under it too; `COMPILE` of compilers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tabane.runtimes.seccomp import ACT_ERRNO, ACT_KILL_PROCESS, ENOSYS, compile_rules

PROGRAM = (
    "clock_gettime",
    "exit_group",
    "getrandom",
    "madvise",
    "mprotect",
    "ppoll",
    "read",
    "rt_sigreturn",
    "writev",
)
"""Of a program that runs once. Most kernels answer `clock_gettime` without a call."""

HTTP = (*PROGRAM, "accept4", "close", "futex")
"""Of one that answers requests: connections come and go, and its threads wait for each other."""

COMPILE = (
    *("brk", "clock_gettime", "close", "exit", "exit_group", "fstat", "futex", "getrandom"),
    *("ioctl", "lseek", "madvise", "mmap", "mprotect", "mremap", "munmap", "newfstatat", "read"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "write", "writev"),
)
"""Of the compiler within the host: it has two files open and opens no other."""

COMPONENT = (
    *COMPILE,
    *("accept4", "access", "arch_prctl", "bind", "clock_nanosleep", "clone", "clone3", "connect"),
    *("epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_wait", "eventfd2", "execve", "fcntl"),
    *("ftruncate", "getpeername", "getsockname", "getsockopt", "gettid", "listen", "memfd_create"),
    *("openat", "poll", "prctl", "pread64", "prlimit64", "readlink", "recvfrom", "recvmsg"),
    *("rseq", "sched_getaffinity", "sched_yield", "sendmsg", "sendto", "set_robust_list"),
    *("set_tid_address", "setsockopt", "shutdown", "socket", "socketpair", "statx"),
)
"""Of the wasmtime program, from its start: the loader, tokio's threads, its sockets. It sees a tree
of its own with a few libraries in it."""

NEVER_EXECUTABLE = {"index": 2, "value": 4, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
"""The third argument without PROT_EXEC."""
GIVE_BACK = {"index": 2, "value": 4, "op": "SCMP_CMP_EQ"}
"""The third argument is MADV_DONTNEED."""
CONDITIONS = {"mprotect": NEVER_EXECUTABLE, "madvise": GIVE_BACK}
"""Of those that serve: no memory becomes code any more."""
ITSELF = {"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}
"""The first argument, a pid, is 0: the caller."""
LENIENT_CONDITIONS = {"prlimit64": ITSELF, "sched_getaffinity": ITSELF}
"""Of the others: no call names another process."""


@cache
def compile_strict(names: tuple[str, ...]) -> bytes:
    """A filter that allows just these, with `CONDITIONS`; any other call ends the process (SIGSYS).

    Raises `Unsupported` without libseccomp.
    """
    return compile_rules(_rules(names, CONDITIONS), ACT_KILL_PROCESS)


@cache
def compile_lenient(names: tuple[str, ...]) -> bytes:
    """A filter that allows just these, with `LENIENT_CONDITIONS`; any other call fails with ENOSYS,
    as on an older kernel."""
    return compile_rules(_rules(names, LENIENT_CONDITIONS), ACT_ERRNO | ENOSYS)


def _rules(names: tuple[str, ...], conditions: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"names": [name], "args": [conditions[name]] if name in conditions else []}
        for name in names
    ]
