"""`dpft` in processes of their own that begin at once: forked from one that has imported what takes seconds of a processor.

They differ from `python -m dpft.harness` in nothing that is tested of processes: signals, exit codes, pipes, siblings.
"""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

HEAVY = (
    "dpft.harness.cli.running",
    "dpft.harness.report",
    "dpft.harness.execution.local",
    "dpft.harness.train.run",
    "dpft.tasks.classification",
    "transformers.models.bert.modeling_bert",
    "evaluate",
    "opacus.accountants",
    "peft",
    "polars",
    "prv_accountant",
    "dp_accounting.pld",
    "sklearn.metrics",
)


class Process:
    """As subprocess.Popen of `dpft ARGUMENTS`, with a pipe from its stderr; its stdout is kept."""

    def __init__(self, *arguments, **environment):
        request = {
            "arguments": [str(a) for a in arguments],
            "folder": os.getcwd(),
            "env": {**os.environ, **environment},
        }
        self._stdout, (outer, inner) = os.memfd_create("stdout"), os.pipe()
        self.pid, self.returncode = _asked(request, [self._stdout, inner]), None
        os.close(inner)
        self.stderr = os.fdopen(outer)

    def poll(self):
        if self.returncode is None:
            self.returncode = _asked({"ended": self.pid})
        return self.returncode

    def wait(self, timeout=120):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"dpft is still running after {timeout} s")
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout=120):
        """(all of its stdout, the rest of its stderr)."""
        err = self.stderr.read()
        self.wait(timeout)
        return os.pread(self._stdout, os.fstat(self._stdout).st_size, 0).decode(), err

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def children(pid):
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _asked(request, descriptors=()):
    message = json.dumps(request).encode()
    link = _server()
    socket.send_fds(link, [len(message).to_bytes(4, "big")], list(descriptors))
    link.sendall(message)
    return json.loads(link.recv(1000))


@functools.cache
def _server():
    """A socket to the process that forks; it ends with this one."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, __file__, str(theirs.fileno())]
    place = os.pathsep.join(["", *sys.path])  # the empty name: where this process is
    server = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": place})
    theirs.close()
    atexit.register(server.wait)
    atexit.register(ours.close)
    return ours


def _serve(link):
    import importlib

    for name in HEAVY:
        importlib.import_module(name)
    while header := (found := socket.recv_fds(link, 4, 2))[0]:
        length, message = int.from_bytes(header, "big"), b""
        while len(message) < length:
            message += link.recv(length - len(message))
        request = json.loads(message)
        answer = _ended(request["ended"]) if "ended" in request else _forked(request, found[1], link)
        link.sendall(json.dumps(answer).encode())


def _ended(child):
    number, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if number else None


def _forked(request, descriptors, link):
    child = os.fork()
    if child:
        for one in descriptors:
            os.close(one)
        return child
    code = 70
    try:
        link.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
        for at, one in enumerate(descriptors, start=1):
            os.dup2(one, at)
            os.close(one)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = ["dpft", *request["arguments"]]

        from dpft.harness import cli

        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
