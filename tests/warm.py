"""Run Python programs in processes that have imported everything already.

Tests start dozens of programs, and importing torch and transformers takes each of them ten seconds. So one process
imports, and forks itself for every program. A program has the arguments, folder, environment and streams that it was
started with. What Python and libraries take from the environment while they are imported is the server's, the seed of
hashes too. At the end of a program no exit handlers run, and other threads are not waited for.

    python warm.py --serve SOCKET       imports, then waits for programs, until its standard input is closed
    python warm.py SOCKET ARGUMENTS     what `python ARGUMENTS` does: a script, - for standard input, -c CODE, -m MODULE
"""

import json
import os
import select
import signal
import socket
import sys
import traceback

LONGEST = 1 << 17  # bytes of one request


def serve(path: str) -> None:
    import_all()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:  # it is closed when pytest ends in any way
        client, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            answer(client)
            os._exit(0)
        client.close()


def import_all() -> None:
    import importlib
    import runpy  # noqa: F401

    import matplotlib.pyplot  # noqa: F401

    from proxsparse.__main__ import COMMANDS

    for name, _ in COMMANDS.values():
        importlib.import_module(f"proxsparse.commands.{name}")
    importlib.import_module("proxsparse.learning.trainer")


def answer(client: socket.socket) -> None:
    """Run a client's program, and send its exit code; soon after a client ends, its program is killed."""
    os.setsid()
    request, streams, *_ = socket.recv_fds(client, LONGEST, 3)
    running, held = os.pipe()  # closed when the program ends, however it ends
    program = os.fork()
    if program == 0:
        client.close()
        for stream, number in enumerate(streams):
            os.dup2(number, stream)
            os.close(number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os._exit(perform(**json.loads(request)))
    for number in (*streams, held):
        os.close(number)
    if running not in select.select([running, client], [], [])[0]:
        os.killpg(0, signal.SIGKILL)
    client.send(str(os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])).encode())


def perform(arguments: list[str], folder: str, environment: dict[str, str]) -> int:
    """What Python does with its arguments; returns the exit code."""
    import random
    import runpy

    import numpy
    import torch

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    random.seed()
    numpy.random.seed()
    sys.path[0] = ""
    arguments = arguments[arguments[0] == "-u" :]
    try:
        if arguments[0] in ("-c", "-"):
            code = arguments.pop(1) if arguments[0] == "-c" else sys.stdin.read()
            sys.argv = arguments
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(arguments[0]))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def ask(path: str, arguments: list[str]) -> int:
    """Have a program run, and return its exit code, as a shell would give it."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(path)
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    code = int(server.recv(16) or 1)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
