"""`python` for a test's commands: see server.py. What is neither a script, code nor one of MODULES, the real interpreter runs."""

import json
import os
import signal
import socket
import struct
import sys

MODULES = ("dvc", "torch.distributed.run")

interpreter, arguments = os.environ["WARM_INTERPRETER"], sys.argv[1:]
if arguments[:1] == ["-u"]:  # as torchrun and pytest-xdist start their workers
    del arguments[0]
is_script = arguments and (arguments[0].endswith(".py") or arguments[0] == "-c")
is_module = arguments[:1] == ["-m"] and arguments[1] in MODULES
if not ((is_script or is_module) and hasattr(os, "pidfd_open")):
    os.execv(interpreter, [interpreter, *sys.argv[1:]])
signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until the server has the request
server = socket.socket(socket.AF_UNIX)
server.connect(os.environ["WARM_SERVER"])
folder = os.getcwd()  # noqa: PTH109 -- pathlib takes longer to import
request = {"arguments": arguments, "folder": folder, "environment": dict(os.environ), "client": os.getpid()}
content = json.dumps(request).encode()
socket.send_fds(server, [struct.pack("!I", len(content))], [0, 1, 2])
server.sendall(content)
for number in signals:
    signal.signal(number, lambda number, _: server.send(bytes([number])))
signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
for stream in (0, 1, 2):
    os.close(stream)  # whoever reads from them waits for the script, and not for this
(status,) = struct.unpack("!i", server.recv(4))
if status < 0:
    if -status != signal.SIGKILL:  # which has no handler to be taken off
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
