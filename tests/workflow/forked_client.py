"""`sdtp` of the environment that `forked.py` makes, with this text in it; nothing that takes time is imported."""

import filecmp
import json
import os
import signal
import socket
import sys

with open(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "forked.json"), "rb") as file:
    SETTINGS = json.load(file)


def files(folder):
    return sorted(
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, names in os.walk(folder)
        for name in names
        if not name.endswith(".pyc")
    )


def same_code():
    """Whether the package that Python would import is, file by file, the one that was imported."""
    first = os.environ.get("PYTHONPATH", "").split(os.pathsep)[0]
    folder = os.path.join(first, "sdtp")
    if not first or not os.path.isdir(folder):
        return True  # it is installed from there
    names = files(folder)
    return names == files(SETTINGS["source"]) and not any(
        filecmp.cmpfiles(folder, SETTINGS["source"], names, shallow=True)[1:]
    )


def same_settings():
    """Whether the variables that libraries read on import are as they were then."""
    here = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(tuple(SETTINGS["prefixes"])) and name not in SETTINGS["set"]
    }
    return here == SETTINGS["environment"]


def ask():
    """Has a child forked, passes signals on to it, and ends as it ends."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(SETTINGS["socket"])
    request = {"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
    status = int(connection.makefile().readline())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


# A lease becomes the command it runs; what is quiet is so from tqdm's import on.
if "lease" in sys.argv[1:2] or {"-q", "--quiet"} & set(sys.argv) or not same_code() or not same_settings():
    os.execv(SETTINGS["program"], [SETTINGS["program"], *sys.argv[1:]])
ask()
