"""What is started in the place of `python` by the words of `loaded_python()`: light, so that it starts at once."""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def be_the_client(address: str, words: list[str]) -> None:
    """Have a child forked for these words, pass on what signals come, and end as it does."""
    asked: list[int] = []
    child = 0

    def forward(number: int, _: object) -> None:
        asked.append(number)
        while child and asked:
            os.kill(child, asked.pop())

    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    folder = os.getcwd()  # noqa: PTH109 pathlib would take as long to import as all else
    socket.send_fds(connection, [json.dumps([words, folder, dict(os.environ)]).encode()], [0, 1, 2])
    child = int(connection.recv(20))
    while asked:
        os.kill(child, asked.pop())
    status = int(connection.recv(20))
    if status >= 0:
        os._exit(status)
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)


if __name__ == "__main__":
    be_the_client(sys.argv[1], sys.argv[2:])
