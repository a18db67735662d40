# SPDX-License-Identifier: Apache-2.0
"""What encloses a program that a model wrote: limits, namespaces of its own, and its certain end.

`enclose` gives the calling process a network without any device, a disk that can only be read, and
a folder of limited size to write in; after `leave_processes` its next child begins a world of
processes that ends with that child. Both need user namespaces, which `can_enclose` tries. `confine`
sets limits and gives up rights, with or without them; `end_descendants` ends what is left. All are
calls of Linux itself, so that no tool has to be installed. To limit one thing more, add it to
`confine`.
"""

import ctypes
import itertools
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20
FOLDER_BYTES = 1 << 24
FILES_OPEN = 128
# Threads are counted, too.
PROCESSES = 32

# Numbers of linux/sched.h, linux/mount.h, linux/prctl.h and linux/capability.h.
_NEW_MOUNTS, _NEW_IPC, _NEW_USER = 0x00020000, 0x08000000, 0x10000000
_NEW_PROCESSES, _NEW_NETWORK = 0x20000000, 0x40000000
_NO_DEVICES, _RECURSIVE, _PRIVATE = 2 | 4, 1 << 14, 1 << 18
_MOUNT_SETATTR, _FROM_HERE, _ALL_BELOW, _READ_ONLY = 442, -100, 0x8000, 1
_PARENT_DEATH_SIGNAL, _DUMPABLE, _KEEP_CAPABILITIES = 1, 4, 8
_SUBREAPER, _NO_NEW_PRIVILEGES = 36, 38
_CAPABILITIES_VERSION, _READ_ANY_FILE = 0x20080522, 1 << 2
_NOBODY = 65534
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    """A function of the C library; raises OSError where it fails."""
    if getattr(_libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


@lru_cache(maxsize=1)
def can_enclose() -> bool:
    """Whether this machine gives namespaces to this user; tried once, in a process of its own."""
    root = Path(__file__).parents[2]
    program = (
        f"import sys; sys.path.insert(0, {str(root)!r}); "
        "from specens.training import containment; containment.try_out()"
    )
    tried = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, check=False)
    return tried.returncode == 0


def try_out() -> None:
    """Enclose this process and a child; raises OSError where the machine does not give it."""
    enclose(Path(tempfile.gettempdir()))
    leave_processes()
    child = os.fork()
    if child == 0:
        with suppress(OSError):
            see_own_processes()
            confine(1)
            os._exit(0)
        os._exit(1)
    if os.waitpid(child, 0)[1] != 0:
        raise OSError("no processes of its own")


def enclose(folder: Path) -> None:
    """Shut this process off: no network, no services, nothing but `folder` can be written.

    Raises:
        OSError: the machine does not give it.
    """
    user, group = os.geteuid(), os.getegid()
    spaces = _NEW_MOUNTS | _NEW_NETWORK | _NEW_IPC
    # Root needs no users of its own for the others, and can then become nobody.
    _call("unshare", spaces if user == 0 else spaces | _NEW_USER)
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="ascii")
    _call("mount", b"none", b"/", None, ctypes.c_ulong(_PRIVATE | _RECURSIVE), None)
    # struct mount_attr: what is set, what is cleared, propagation, a user namespace.
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _call("syscall", _MOUNT_SETATTR, _FROM_HERE, b"/", _ALL_BELOW, attributes, size)
    # The sockets of services, which would start processes outside of all this.
    services = Path("/run").resolve()
    if services.is_dir() and not Path(os.__file__).resolve().is_relative_to(services):
        _mount_memory(services, read_only=True)
    _mount_memory(folder)


def _mount_memory(folder: Path, *, read_only: bool = False) -> None:
    """An empty file system in memory, over what is there."""
    flags = ctypes.c_ulong(_NO_DEVICES | int(read_only))
    options = f"size={FOLDER_BYTES},nr_inodes=4096,mode=1777".encode()
    _call("mount", b"none", os.fsencode(folder), b"tmpfs", flags, options)


def leave_processes() -> None:
    """The next child is the first process of a world of its own, and the last to end there."""
    _call("unshare", _NEW_PROCESSES)


def see_own_processes() -> None:
    """For that child: /proc shows the processes of its world alone."""
    _call("unshare", _NEW_MOUNTS)
    _call("mount", b"proc", b"/proc", b"proc", ctypes.c_ulong(_NO_DEVICES), None)


def adopt_orphans() -> None:
    """Whoever descends from this process and loses its parent becomes this process's child."""
    _call("prctl", _SUBREAPER, 1, 0, 0, 0)


def hide() -> None:
    """No process of the same user may look into this one's memory, or open its files."""
    _call("prctl", _DUMPABLE, 0, 0, 0, 0)


def confine(seconds: int) -> None:
    """Set this process's limits, and give up its rights, for good; it ends with its parent."""
    _limit(resource.RLIMIT_CPU, seconds)
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_FSIZE, FILE_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, FILES_OPEN)
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if os.geteuid() == 0:
        _become_nobody()
    else:
        _keep_capabilities(0)
    _limit(resource.RLIMIT_NPROC, PROCESSES + _tasks_of(os.geteuid()))
    # After the others: becoming somebody else takes it back.
    _call("prctl", _PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _become_nobody() -> None:
    """Of root no limit of processes holds. Where Python is root's alone, reading is kept."""
    private = not all(map(_anybody_reads, filter(os.path.exists, sys.path)))
    kept = _READ_ANY_FILE & _capabilities() if private else 0
    _call("prctl", _KEEP_CAPABILITIES, 1, 0, 0, 0)
    if kept or not private:
        # A container may not give other users; the capabilities go all the same.
        with suppress(OSError):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _keep_capabilities(kept)


def _anybody_reads(file: str) -> bool:
    place = Path(file).resolve()
    return all(at.stat().st_mode & 0o001 for at in place.parents) and bool(
        place.stat().st_mode & 0o004
    )


def _capabilities() -> int:
    """Those that this process may have."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("CapPrm:")[2].split()[0], 16)


def _keep_capabilities(kept: int) -> None:
    """Of the first 32; none of the others."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION)
    # Effective, permitted and inheritable, of each 32.
    _call("capset", header, (ctypes.c_uint32 * 6)(kept, kept))


def _tasks_of(user: int) -> int:
    """Processes and threads that the user has by now."""
    tasks = 0
    for process in _processes():
        with suppress(OSError):
            if (Path("/proc") / process).stat().st_uid == user:
                tasks += len(os.listdir(f"/proc/{process}/task"))
    return tasks


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()]


def end_descendants() -> None:
    """End all processes that descend from this one, which has adopted orphans; wait for them."""
    while True:
        for process in _descendants():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _descendants() -> set[int]:
    parents: dict[int, int] = {}
    for process in _processes():
        with suppress(OSError):
            status = Path(f"/proc/{process}/stat").read_bytes()
            # Its name, in brackets, may hold anything.
            parents[int(process)] = int(status.rpartition(b")")[2].split()[1])
    below = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return below - {os.getpid()}


def bytes_in(folder: Path) -> int:
    """Of all files in a folder, and in those below it, however deep."""
    total, folders = 0, [str(folder)]
    while folders:
        with suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    return total


def remove(folder: Path) -> None:
    """Delete a folder, in time that does not grow with how deep it is; nobody else is in it."""
    numbers = itertools.count()
    mark = secrets.token_hex(8)
    folder.chmod(0o700)
    while listed := list(folder.iterdir()):
        for inner in listed:
            if inner.is_symlink() or not inner.is_dir():
                inner.unlink()
                continue
            inner.chmod(0o700)
            for moved in inner.iterdir():
                # A folder that is moved is written to.
                if moved.is_dir() and not moved.is_symlink():
                    moved.chmod(0o700)
                moved.rename(folder / f"{mark}-{next(numbers)}")
            inner.rmdir()
    folder.rmdir()
