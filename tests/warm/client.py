"""`python` for a test's commands: see server.py. For anything but a script, such as `-m` or `-c`, the real interpreter runs."""

import json
import os
import signal
import socket
import struct
import sys

interpreter, arguments = os.environ["WARM_INTERPRETER"], sys.argv[1:]
script = arguments[1:] if arguments[:1] == ["-u"] else arguments  # as torchrun starts its workers
if not (script and script[0].endswith(".py") and hasattr(os, "pidfd_open")):
    os.execv(interpreter, [interpreter, *arguments])
server = socket.socket(socket.AF_UNIX)
server.connect(os.environ["WARM_SERVER"])
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, _: server.send(bytes([number])))
folder = os.getcwd()  # noqa: PTH109 -- pathlib takes longer to import
request = {"arguments": script, "folder": folder, "environment": dict(os.environ)}
content = json.dumps(request).encode()
socket.send_fds(server, [struct.pack("!I", len(content))], [0, 1, 2])
server.sendall(content)
for stream in (0, 1, 2):
    os.close(stream)  # whoever reads from them waits for the script, and not for this
(status,) = struct.unpack("!i", server.recv(4))
if status < 0:
    if -status != signal.SIGKILL:  # which has no handler to be taken off
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
