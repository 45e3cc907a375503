"""The socket that the server listens on."""

import socket

from megatron_star.server.http_server import bind


def test_small_answers_do_not_wait_for_those_before_them_to_be_acknowledged():
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
