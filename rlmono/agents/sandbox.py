"""The child process of the Python tool: it locks itself in, then runs the code that comes on its standard input.

    python -I sandbox.py LIMITS STATUS_FD       LIMITS: JSON of python_tool.Limits; STATUS_FD gets the layers that hold, as JSON

Nothing of rlmono is imported here. Layers, each by itself: resource limits; no capabilities; Landlock (files); seccomp (system calls).
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import traceback

EPERM, ENOSYS = 1, 38
CLONE_THREAD = 0x10000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446      # Landlock's calls, on every machine
READ, WRITE = 0b1101, 0x7FF2      # execute, read files, read folders; everything else of Landlock's third version

# audit architecture; calls that are denied; calls that do nothing and say that they did; clone, clone3, prlimit64. linux/audit.h, asm/unistd.h
# Denied:
#   new processes and programs · sockets · signals to and memory of others · limits · io_uring, which goes round this filter
#   mounts, namespaces, kernel programs, keys, file handles
#   priorities and processors, which can be others' · System V memory and queues, which stay · what Landlock leaves: truncate, owners, attributes
# Nothing: modes and times of files, which Landlock leaves too, and which copying a file sets.
MACHINES = {
    "x86_64": (0xC000003E, (57, 58, 59, 322, 41, 53, 62, 200, 234, 129, 297, 101, 310, 311, 424, 434, 438, 160, 425, 165, 166, 272, 308, 161, 155,
                            321, 298, 323, 248, 249, 250, 304,
                            141, 142, 144, 203, 251, 256, 279, 314, 440, 29, 64, 68, 240,
                            76, 92, 93, 94, 260, 188, 189, 190, 197, 198, 199, 463, 466),
               (90, 91, 268, 452, 132, 235, 261, 280), 56, 435, 302),
    "aarch64": (0xC00000B7, (221, 281, 198, 199, 129, 130, 131, 138, 240, 117, 270, 271, 424, 434, 438, 164, 425, 40, 39, 97, 268, 51, 41,
                             280, 241, 282, 217, 218, 219, 265,
                             140, 118, 119, 122, 30, 238, 239, 274, 440, 194, 190, 186, 180, 45, 54, 55, 5, 6, 7, 14, 15, 16, 463, 466),
                (52, 53, 452, 88), 220, 435, 261),
}
libc = ctypes.CDLL(None, use_errno=True)


def limit(limits: dict[str, float]) -> bool:
    """Processor seconds, address space, size of a file, open files; no core dumps."""
    cpu = int(limits["cpu_s"])
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    for what, most in ((resource.RLIMIT_AS, limits["memory_bytes"]), (resource.RLIMIT_FSIZE, limits["file_bytes"]), (resource.RLIMIT_NOFILE, 64),
                       (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (int(most), int(most)))
    return True


def drop_capabilities() -> bool:
    """Root's too: it stays root in name only."""
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    return bool(libc.capset(header, nothing) == 0)


def landlock(folder: str) -> bool:
    """Files: read Python and the system's libraries, read and write `folder`, and nothing else. Needs Linux 5.13."""
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    handled = (READ | WRITE) & ~(0 if version >= 3 else 1 << 14) & ~(0 if version >= 2 else 1 << 13)
    rules = struct.pack("Q", handled)
    ruleset = libc.syscall(CREATE_RULESET, rules, ctypes.c_size_t(len(rules)), 0)
    readable = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)), "/usr", "/lib", "/lib64", "/etc/ld.so.cache",
                "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/sys/devices/system/cpu"}
    for path, access in [(folder, READ | WRITE), *((p, READ) for p in sorted(readable) if os.path.exists(p))]:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        on_files = 0b110 | 1 | 1 << 14          # of a file: execute, write, read, truncate
        rule = struct.pack("<Qi", handled & access & (on_files if not os.path.isdir(path) else handled), opened)
        if libc.syscall(ADD_RULE, ruleset, 1, rule, 0):
            return False
        os.close(opened)
    return bool(libc.syscall(RESTRICT_SELF, ruleset, 0) == 0)


def seccomp() -> bool:
    """No new process and no other program, no socket, no signal to anybody, no higher limits, no change to what files are allowed. Threads stay
    possible."""
    if (machine := MACHINES.get(platform.machine())) is None:
        return False
    architecture, denied, idle, clone, clone3, prlimit64 = machine
    load, equal, has, give, above = 0x20, 0x15, 0x45, 0x06, 0x35        # BPF: ld [k]; jeq; jset; ret; jge
    allow, deny, absent, nothing = ((give, 0, 0, answer) for answer in (0x7FFF0000, 0x50000 | EPERM, 0x50000 | ENOSYS, 0x50000))
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), deny, (load, 0, 0, 0), (above, 0, 1, 0x40000000), deny]
    for call in denied:
        program += [(equal, 0, 1, call), deny]
    for call in idle:
        program += [(equal, 0, 1, call), nothing]
    program += [(equal, 0, 1, clone3), absent]          # glibc then takes clone, whose flags can be read
    program += [(equal, 0, 4, clone), (load, 0, 0, 16), (has, 0, 1, CLONE_THREAD), allow, deny]
    program += [(equal, 0, 6, prlimit64), (load, 0, 0, 32), (equal, 0, 3, 0), (load, 0, 0, 36), (equal, 0, 1, 0), allow, deny]
    code = b"".join(struct.pack("HBBI", *line) for line in [*program, allow])
    lines = ctypes.create_string_buffer(code)
    filter = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(lines))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter, 0, 0) == 0)


def main() -> int:
    limits, status = json.loads(sys.argv[1]), int(sys.argv[2])
    code = sys.stdin.read()
    layers = {"limits": limit(limits), "capabilities": drop_capabilities()}
    private = libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    layers["files"] = private and landlock(os.getcwd())
    layers["calls"] = private and seccomp()
    os.write(status, json.dumps(layers).encode())
    os.close(status)
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException as e:
        own = e.__traceback__.tb_next if e.__traceback__ is not None else None
        sys.stdout.flush()
        print("".join(traceback.format_exception(type(e), e, own)).rstrip(), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
