"""`dvc` and `wanda-dvc` as forks of a process that has imported what they import, for tests of whole pipelines.

A stage on a tiny model computes for a few tenths of a second; its imports take two to four seconds of the processor.
What runs is each command's own entry point, in a process of its own, with its own words, folder, environment and
streams. Tests of starting and killing processes take the real commands.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import NoReturn

ENTRIES = {"dvc": "dvc.cli:main", "wanda-dvc": "wanda_dvc.cli:run"}
# What the commands import while they run. One that is missing here costs time, and changes nothing.
IMPORTED = [
    "wanda_dvc.engine.harness", "wanda_dvc.commands.export", "wanda_dvc.results.report", "wanda_dvc.stages.apply",
    "wanda_dvc.stages.calibrate", "wanda_dvc.stages.download", "wanda_dvc.stages.plan", "wanda_dvc.stages.mask",
    "wanda_dvc.stages.perplexity", "wanda_dvc.stages.zero_shot", "wanda_dvc.commands.doctor",
    "wanda_dvc.results.listing", "wanda_dvc.results.stats", "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama", "dvc.cli.parser", "dvc.data_cloud", "dvc.repo.experiments.show",
    "dvc.repo.index", "dvc.repo.reproduce", "dvc.utils.hydra", "networkx",
]  # fmt: skip
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    said = json.dumps([{command!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(said).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(said)
    code = server.recv(1)
sys.exit(code[0] if code else 1)
"""
ENVIRONMENT = os.environ | {"PYTHONWARNINGS": "ignore", "DVC_NO_ANALYTICS": "1"}  # before a test changes anything


@cache
def commands(**environment: str) -> Path:
    """Return a folder of both commands. They work as long as this process runs.

    Args:
        environment: Variables that are set before anything is imported, such as PYTHONPATH for another package.
    """
    folder = Path(tempfile.mkdtemp(prefix="wanda-dvc-forks-"))
    address = str(folder / "address")
    for command in ENTRIES:
        (folder / command).write_text(CLIENT.format(python=sys.executable, address=address, command=command))
        (folder / command).chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:  # clients may wait there while the server imports
        listener.bind(address)
        listener.listen(128)
        words, passed = [sys.executable, __file__, str(listener.fileno())], [listener.fileno()]
        server = subprocess.Popen(words, env=ENVIRONMENT | environment, stdin=subprocess.PIPE, pass_fds=passed)

    def end() -> None:
        server.communicate()
        shutil.rmtree(folder)

    atexit.register(end)
    return folder


def serve(listener: socket.socket) -> None:
    """Fork for each client, until stdin ends."""
    import offline
    from parsing import parse_once
    from ruamel.yaml import YAML
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from wanda_dvc.sources.tasks import task_definition

    for name in IMPORTED:
        importlib.import_module(name)
    task_definition("piqa")  # lm-eval's index of its tasks
    get_checkpoint_conversion_mapping("llama")  # compiles the patterns of all families
    parse_once()
    offline.block()
    YAML(typ="safe").load((Path(__file__).parent.parent / "dvc.yaml").read_text(encoding="utf-8"))
    gc.freeze()  # a collection in a fork would copy the pages of all that is imported
    entries = {command: resolve_name(place) for command, place in ENTRIES.items()}
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            _become(connection, entries)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _become(connection: socket.socket, entries: dict[str, Callable[[], int | None]]) -> NoReturn:
    """Run a client's command in this process, and tell the client how it ended."""
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    with connection.makefile("rb") as file:
        command, words, folder, environment = json.loads(file.read(int.from_bytes(size, "big")))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [command, *words]
    this, leave = os.getpid(), os._exit

    def tell_and_leave(code: int) -> NoReturn:
        if os.getpid() == this:
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(bytes([code & 255]))
        leave(code)

    os._exit = tell_and_leave  # type: ignore[assignment]
    code: object = 1
    try:
        code = entries[command]()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined] # as Python ends, but for taking a million objects apart
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
