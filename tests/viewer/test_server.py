"""The server without a browser: who is kept, what ends with it, and where it listens."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from graf.base.errors import UserError
from graf.evaluation.renderer import Renderer
from graf.viewer.exhibit import Exhibit
from graf.viewer.listening import LAST_PORT

pytest.importorskip("viser")

from graf.viewer import server as server_module
from graf.viewer.server import ViewerServer


@pytest.fixture
def server(renderer: Renderer):
    server = ViewerServer(Exhibit(renderer, "toys"), port=18380)
    yield server
    server.stop()


class Page:
    """The place of a client: what it was told."""

    def __init__(self, client_id: int = 0) -> None:
        self.received: list[object] = []
        self.complaints: list[str] = []
        note = SimpleNamespace(body="", remove=lambda: None)
        self.handle = SimpleNamespace(client_id=client_id, add_notification=lambda *given, **more: note)
        self.send, self.complain = self.received.append, self.complaints.append


def test_a_page_that_was_closed_while_its_controls_were_built_is_not_kept(server, monkeypatch):
    """viser tells of coming and going in several threads, and the second may be faster."""
    monkeypatch.setattr(server_module, "Client", lambda handle, server: Page(handle.client_id))
    handle = SimpleNamespace(client_id=7)
    server._disconnect(handle)
    server._connect(handle)
    assert server.clients() == []


def test_stopping_leaves_files_unfinished_and_no_thread_behind(server):
    page, begun = Page(), threading.Event()
    server._clients[0] = page

    def make(renderer: Renderer, progress: object) -> dict[str, bytes]:
        begun.set()
        while True:  # as the densities of a fine mesh, which take minutes
            renderer.density(torch.zeros(8, 3))

    server.make(page, "mesh", make)
    server.make(page, "picture", lambda renderer, progress: {"picture.png": b""})
    assert begun.wait(5)
    started = time.monotonic()
    server.stop()
    assert time.monotonic() - started < 3
    assert page.received == page.complaints == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("graf-view")]


def test_a_file_that_cannot_be_made_is_told_and_the_next_one_is_made(server, caplog):
    page = Page()
    server._clients[0] = page

    def refuse(*given: object) -> dict[str, bytes]:
        raise UserError("there is no surface")

    def fail(*given: object) -> dict[str, bytes]:
        raise ValueError("a defect")

    for make in (refuse, fail, lambda *given: {"picture.png": b"it"}):
        server.make(page, "mesh", make)
    deadline = time.monotonic() + 5
    while not page.received and time.monotonic() < deadline:
        time.sleep(0.01)
    assert page.received == [{"picture.png": b"it"}]
    assert page.complaints[0] == "there is no surface"
    assert "the terminal of graf view shows why" in page.complaints[1]
    assert "a defect" in caplog.text


def test_a_page_cannot_have_the_viewer_published_on_the_internet(server, caplog):
    """viser would, by a relay, for any page that sends it the message that its hidden button sends."""
    assert server._server.request_share_url() is None
    assert "does not do" in caplog.text


def test_a_taken_port_is_left_to_its_owner(server, renderer):
    other = ViewerServer(Exhibit(renderer, "toys"), port=server.port)
    try:
        assert other.port != server.port
    finally:
        other.stop()


def test_where_nothing_can_be_listened_at_is_told(renderer):
    """viser would wait without end."""
    for host in ("203.0.113.1", "no such host"):
        with pytest.raises(UserError, match=f"--host {host}: cannot listen there"):
            ViewerServer(Exhibit(renderer, "toys"), host=host)
    with socket.create_server(("127.0.0.1", LAST_PORT)), pytest.raises(UserError, match="choose another --port"):
        ViewerServer(Exhibit(renderer, "toys"), port=LAST_PORT)
