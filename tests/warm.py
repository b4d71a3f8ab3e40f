"""A Python that starts warm: forks of one process that has imported torch and vgen and never computed.

`warm_python()` gives the path of an executable that takes the arguments of `python` (a script, `-m` or `-c`). Its
program is a process of its own: arguments, environment, folder, open files, blocked signals, session and exit status
are those of a fresh interpreter, it can be killed, and it starts others the same way through `sys.executable`. It
shares the hash seed and the imported modules, which do not read environment variables again: some tests start
`sys.executable`, which is cold in them. Where an import starts threads, which some installations do, a process cannot
be forked safely, and programs start cold.
"""

import atexit
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any, NoReturn

# without datasets, whose pyarrow starts threads
PRELOADED = (
    "accelerate.commands.launch", "diffusers", "multiprocessing.spawn", "numpy", "torch",
    "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp.fully_sharded_data_parallel",
    "torch.distributed.run", "torch.utils.data", "torch.utils.flop_counter", "torch.utils.tensorboard", "transformers",
    "vgen.cli", "vgen.data.video_io", "vgen.tasks.evaluation", "vgen.tasks.jobs", "vgen.pipeline", "vgen.training.run",
)  # fmt: skip

FOLDER = "VGEN_WARM_PYTHON"
"""Environment variable with the folder of the running server."""

COLD = ".cold"
"""Suffix of the file that tells clients to start a fresh interpreter."""

# replaces the interpreter: sends its arguments to the server, forwards signals and ends as the program did
CLIENT = """#!{python} -SE
import json, os, signal, socket, sys, time

def inheritable(file):
    try:
        return os.get_inheritable(file)
    except OSError:
        return False

files = [file for file in map(int, os.listdir("/dev/fd")) if inheritable(file)]
while not os.path.exists({address!r}):
    if os.path.exists({cold!r}):
        os.execv({python!r}, [{python!r}, *sys.argv[1:]])
    with open({errors!r}) as file:
        errors = file.read()
    if "Traceback" in errors or time.time() > {deadline}:
        sys.exit("the warm interpreter has not started: " + errors)
    time.sleep(0.05)
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    request = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ), "files": files}}
    request["blocked"] = list(blocked)
    request = json.dumps(request).encode()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    socket.send_fds(server, [len(request).to_bytes(8, "big")], files)
    server.sendall(request)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    code = int(server.recv(8) or 1)
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def start_server() -> Path:
    """Starts the server in the background, for this process and those that it starts; it ends with this process.

    Returns the path of the warm interpreter, which waits for the server.
    """
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    client, address, errors = folder / "python", folder / "socket", folder / "errors"
    paths = {"address": str(address), "errors": str(errors), "cold": f"{address}{COLD}"}
    client.write_text(CLIENT.format(python=sys.executable, deadline=time.time() + 300, **paths))
    client.chmod(0o755)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # CUDA does not fork
    command = [sys.executable, __file__, str(address), str(client)]
    with errors.open("wb") as file:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": file}
        server = subprocess.Popen(command, env=environment, **pipes)
    assert server.stdin
    atexit.register(server.stdin.close)  # which ends it
    os.environ[FOLDER] = str(folder)
    return client


def warm_python() -> str:
    """The path of the warm interpreter; starts the server where pytest's main process has not."""
    return str(Path(os.environ[FOLDER]) / "python" if FOLDER in os.environ else start_server())


def serve(address: str, client: str) -> dict[str, Any]:
    """Forks at each request; returns only in the forks, with what to run."""
    for name in PRELOADED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    threads = Path("/proc/self/task")
    if threads.exists() and len(list(threads.iterdir())) > 1:  # started by an import; they make forks unsafe
        Path(address + COLD).touch()
        sys.exit()
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")  # renamed once it listens
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener.listen(64)
    os.rename(f"{address}.new", address)
    while True:
        readable, _, _ = select.select([listener, 0], [], [])
        if 0 in readable:
            shutil.rmtree(Path(address).parent, ignore_errors=True)
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.executable = client
            return supervise(connection)
        connection.close()


def supervise(connection: socket.socket) -> dict[str, Any]:
    """Forks once more and returns in the fork; the other process answers the client and never returns."""
    size, files, *_ = socket.recv_fds(connection, 8, 64)
    request = b""
    while missing := int.from_bytes(size, "big") - len(request):  # signals may follow
        part = connection.recv(missing)
        if not part:
            os._exit(1)
        request += part
    server = os.getppid()
    os.setsid()  # what ends the tests' process group does not end this process
    child = os.fork()
    if child == 0:
        connection.close()
        os.setsid()
        program = json.loads(request)
        numbers = program.pop("files")
        above = [fcntl.fcntl(file, fcntl.F_DUPFD, max(numbers) + 1) for file in files]
        for file in files:
            os.close(file)
        for file, number in zip(above, numbers, strict=True):
            os.dup2(file, number)
            os.close(file)
        return program
    for file in files:
        os.close(file)
    watch(connection, child, server)


def watch(connection: socket.socket, child: int, server: int) -> NoReturn:
    """Forwards signals to a program, tells its end, and kills it when its client or the server is gone."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            try:
                connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            finally:
                os._exit(0)
        if select.select([connection], [], [], 0.005)[0]:
            numbers = connection.recv(8)
            for number in numbers:
                os.kill(child, number)
            if not numbers:
                break
        if os.getppid() != server:
            break
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os._exit(0)


def run(arguments: list[str], folder: str, environment: dict[str, str], blocked: list[int]) -> None:
    """Runs a program as `python` does."""
    import random

    import numpy
    import torch

    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    numpy.random.seed()
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    kind, *rest = arguments
    while kind in ("-B", "-u"):  # forks write no bytecode
        if kind == "-u":
            for stream in (sys.stdout, sys.stderr):
                stream.reconfigure(write_through=True)  # type: ignore[union-attr]
        kind, *rest = rest
    if kind == "-m":
        sys.argv, sys.path[0] = rest, folder
        sys.modules.pop(rest[0], None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if kind == "-c":
        source, sys.argv, sys.path[0] = rest[0], ["-c", *rest[1:]], ""
    else:
        source, sys.argv, sys.path[0] = Path(kind).read_text(), [kind, *rest], str(Path(kind).resolve().parent)
        main.__file__ = kind
    exec(compile(source, "<string>" if kind == "-c" else kind, "exec"), main.__dict__)


def leave(code: int) -> NoReturn:
    """Ends a program without taking all modules apart, which takes half a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    program = serve(*sys.argv[1:])
    try:
        run(**program)
    except SystemExit as stop:
        if "WORLD_SIZE" in os.environ:  # processes that know of one another end as they would
            raise
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        leave(1 if isinstance(stop.code, str) else stop.code or 0)
    except BaseException:
        traceback.print_exc()
        if "WORLD_SIZE" in os.environ:
            raise SystemExit(1) from None
        leave(1)
    if "WORLD_SIZE" not in os.environ:
        leave(0)
