"""A proxy that breaks connections."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cutting_proxy(port: int, bytes_each: int) -> Iterator[tuple[int, list[int]]]:
    """A TCP proxy to `port` that ends each of its first three connections after `bytes_each` bytes of answer."""
    connections: list[int] = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                downstream, _ = listener.accept()
            except OSError:  # closed: the test is over
                return
            connections.append(1)
            limit = bytes_each if len(connections) <= 3 else None
            threading.Thread(target=answer, args=(downstream, limit), daemon=True).start()

    def answer(downstream: socket.socket, limit: int | None) -> None:
        with downstream, socket.create_connection(("127.0.0.1", port)) as upstream:
            upstream.sendall(downstream.recv(65_536))
            sent = 0
            while (chunk := upstream.recv(512)) and (limit is None or sent < limit):
                downstream.sendall(chunk)
                sent += len(chunk)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield listener.getsockname()[1], connections
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()
