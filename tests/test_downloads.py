import base64
import errno
import hashlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from blob_server import BlobServer, serving

from sae_emotion_plugin import downloads
from sae_emotion_plugin.downloads import download

CONTENT = random.Random(0).randbytes(5_000_000)
FILE = "/folder/8.pt"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BlobServer]:
    monkeypatch.setattr(downloads, "BACK_OFF", 0.001)
    with serving() as server:
        server.files[FILE] = CONTENT
        yield server


def fetched(server: BlobServer, path: Path, **options: object) -> bytes:
    return download(server.url + FILE, path, **options).read_bytes()  # pyright: ignore[reportArgumentType]


def left(folder: Path) -> list[str]:
    """What lies in the folder but for the locks, which stay."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_file_is_downloaded_once_and_then_no_network_is_touched(server, tmp_path):
    path = tmp_path / "deep" / "8.pt"
    assert fetched(server, path) == CONTENT
    server.faults = ["503"] * 99
    assert fetched(server, path) == CONTENT
    assert download("http://127.0.0.1:1/none", path) == path
    assert server.asked == [(FILE, None)] and left(path.parent) == ["8.pt"]
    server.faults, server.files[FILE] = [], b"newer"
    assert fetched(server, path, force=True) == b"newer"


@pytest.mark.parametrize("etags", [True, False])
def test_a_broken_connection_is_taken_up_where_it_broke(etags, server, tmp_path):
    server.faults, server.etags = ["drop", "drop", "503", "drop"], etags
    assert fetched(server, tmp_path / "8.pt") == CONTENT
    starts = [int(wanted.split("=")[1][:-1]) if wanted else 0 for _, wanted in server.asked]
    received = len(CONTENT) // 2 // downloads._CHUNK * downloads._CHUNK
    assert starts[:2] == [0, received] and starts == sorted(starts) and len(starts) == 5
    assert left(tmp_path) == ["8.pt"]


def test_a_server_without_ranges_is_asked_from_the_start_again(server, tmp_path):
    server.faults, server.ranges = ["drop", "drop"], False
    assert fetched(server, tmp_path / "8.pt") == CONTENT


def test_a_file_that_changes_meanwhile_is_never_put_together_from_two(server, tmp_path):
    server.faults = ["drop"] * 20
    with pytest.raises(FileNotFoundError, match="the connection breaks again and again"):
        server.ranges = False
        fetched(server, tmp_path / "8.pt")
    server.faults, server.ranges, server.files[FILE] = [], True, CONTENT[::-1]
    assert fetched(server, tmp_path / "8.pt") == CONTENT[::-1]
    assert server.asked[-2][1] is not None and server.asked[-1][1] is None


@pytest.mark.parametrize("count", [1, 4])
def test_a_busy_server_is_asked_again(count, server, tmp_path):
    server.faults = ["503"] * count
    assert fetched(server, tmp_path / "8.pt") == CONTENT
    assert len(server.asked) == count + 1


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["503"] * 99, "the server answers 503 Service Unavailable"),
        (["long"] * 99, "the server does not always send the same file|the connection breaks"),
        (["stall"] * 99, "the server cannot be reached or does not answer$"),
    ],
)
def test_a_server_that_never_gets_it_right_ends_in_one_line_and_a_second_try_works(
    faults, message, server, tmp_path, monkeypatch
):
    monkeypatch.setattr(downloads, "TIMEOUT", (0.2, 0.2))
    monkeypatch.setattr(downloads, "ATTEMPTS", 2)
    server.faults = faults
    with pytest.raises(FileNotFoundError, match=rf"^cannot download {server.url}{FILE}: ({message})") as error:
        fetched(server, tmp_path / "8.pt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "8.pt").exists()
    server.faults = []
    assert fetched(server, tmp_path / "8.pt") == CONTENT
    assert left(tmp_path) == ["8.pt"]


def test_a_missing_file_and_a_missing_server_are_reported_in_one_line(server, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"cannot download .*/none: the server answers 404 Not Found$"):
        download(f"{server.url}/none", tmp_path / "8.pt")
    monkeypatch.setattr(downloads, "ATTEMPTS", 1)
    with pytest.raises(
        FileNotFoundError, match=r"cannot download .*: the server cannot be reached or does not answer$"
    ):
        download("http://127.0.0.1:1/8.pt", tmp_path / "8.pt")
    assert left(tmp_path) == []


def test_another_hash_than_expected_leaves_nothing(server, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert fetched(server, tmp_path / "8.pt", expected_sha256=digest) == CONTENT
    server.faults = ["damaged"]
    with pytest.raises(ValueError, match=rf"{FILE} has the SHA-256 [0-9a-f]{{64}}, not {digest}$"):
        fetched(server, tmp_path / "9.pt", expected_sha256=digest)
    assert left(tmp_path) == ["8.pt"]


def test_the_md5_that_the_server_states_is_checked_after_an_interruption_too(server, tmp_path):
    server.headers = {"x-ms-blob-content-md5": base64.b64encode(hashlib.md5(CONTENT).digest()).decode()}
    server.faults = ["drop"]
    assert fetched(server, tmp_path / "8.pt") == CONTENT
    server.faults = ["drop", "damaged"]
    with pytest.raises(ValueError, match="came with another MD5 than its server states"):
        fetched(server, tmp_path / "9.pt")
    assert left(tmp_path) == ["8.pt"]


def test_what_the_check_refuses_never_gets_its_name(server, tmp_path):
    def refuse(path: Path) -> None:
        raise ValueError(f"{path} is no checkpoint")

    with pytest.raises(ValueError, match=rf"^{server.url}{FILE} is no checkpoint$"):
        fetched(server, tmp_path / "8.pt", check=refuse)
    assert left(tmp_path) == []


def test_a_full_disk_leaves_nothing_and_a_second_try_works(server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(downloads.shutil, "disk_usage", lambda path: _Free())
        with pytest.raises(ValueError, match=r"cannot write .*: 5,000,000 bytes are needed, 7 are free; SAE_EMOTION_C"):
            fetched(server, tmp_path / "8.pt")
    assert left(tmp_path) == []

    class Full:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None: ...
        def update(self, n: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "tqdm", Full)
        with pytest.raises(ValueError, match="No space left on device"):
            fetched(server, tmp_path / "8.pt")
    assert left(tmp_path) == []
    assert fetched(server, tmp_path / "8.pt") == CONTENT


class _Free:
    free = 7


def test_a_folder_that_cannot_be_written_is_named_with_what_helps(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*file/deep: .*; SAE_EMOTION_CACHE names another folder"):
        fetched(server, tmp_path / "file" / "deep" / "8.pt")
    assert server.asked == []


PROGRAM = (
    "import sys, sae_emotion_plugin.downloads as d\nd._CHUNK = 4096\n"
    "d.download(sys.argv[1], sys.argv[2])\nprint('done')"
)


RECEIVED = len(CONTENT) // 2 // 4096 * 4096
"""What that program has on disk when the connection breaks halfway."""


def start(url: str, path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", PROGRAM, url, str(path)], text=True, stdout=subprocess.PIPE)


def test_two_processes_that_ask_at_once_download_once(server, tmp_path):
    processes = [start(server.url + FILE, tmp_path / "8.pt") for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["done\n", "done\n"]
    assert (tmp_path / "8.pt").read_bytes() == CONTENT
    assert server.asked == [(FILE, None)]


def test_two_threads_that_ask_at_once_download_once(server, tmp_path):
    threads = [threading.Thread(target=fetched, args=(server, tmp_path / "8.pt")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == [(FILE, None)]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_killed_download_goes_on_in_the_next_process(server, tmp_path):
    server.faults = ["drop", "stall"]
    process = start(server.url + FILE, tmp_path / "8.pt")
    partial = tmp_path / ".8.pt.part"
    deadline = time.monotonic() + 60
    while not (len(server.asked) == 2 and partial.stat().st_size == RECEIVED):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "8.pt").exists()
    assert fetched(server, tmp_path / "8.pt") == CONTENT
    assert server.asked[-1] == (FILE, f"bytes={RECEIVED}-")
    assert left(tmp_path) == ["8.pt"]
