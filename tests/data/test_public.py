"""Downloads against a local HTTP server that cuts, refuses, lies and asks for a browser."""

from __future__ import annotations

import errno
import hashlib
import io
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from perturbzoo.data.public import DATASETS, PublicDataset, fetch
from perturbzoo.errors import PerturbZooError

H5AD = b"\x89HDF\r\n\x1a\n" + np.random.default_rng(0).bytes(300_000)


@dataclass
class Host:
    """What the server holds, how it misbehaves, and what it was asked."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)  # bytes after which each coming answer is cut
    status: list[int] = field(default_factory=list)  # codes of the coming answers, before it behaves
    ranges: bool = True
    content_type: str = "application/octet-stream"
    asked: list[str | None] = field(default_factory=list)  # the Range header of each request


@pytest.fixture
def host() -> Iterator[Host]:
    state = Host()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.asked.append(asked)
            content = state.files.get(self.path)
            code = state.status.pop(0) if state.status else 200 if content is not None else 404
            if code != 200:
                self.send_response(code)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.ranges else 0
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if asked and state.ranges else 200)
            if asked and state.ranges:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("Content-Type", state.content_type)
            self.end_headers()
            body = content[start:]
            self.wfile.write(body[: state.cut_after.pop(0)] if state.cut_after else body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    state.files["/plain.h5ad"] = H5AD
    state.files["/archive"] = zipped({"norman/perturb_processed.h5ad": H5AD, "norman/go.csv": b"a,b"})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def entry(host: Host, path: str, checksum: str | None = None) -> PublicDataset:
    member = "perturb_processed.h5ad" if path == "/archive" else None
    return PublicDataset("toy", host.address + path, member, checksum, True, "", "")


def md5(content: bytes) -> str:
    return "md5:" + hashlib.md5(content).hexdigest()


def get(dataset: PublicDataset, folder: Path, attempts: int = 2) -> Path:
    return fetch(dataset, folder, progress=False, attempts=attempts, pause=0.0)


def test_a_plain_file_is_downloaded_once(host, tmp_path):
    dataset = entry(host, "/plain.h5ad", md5(H5AD))
    path = get(dataset, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "toy.h5ad"
    assert path.read_bytes() == H5AD
    assert get(dataset, tmp_path / "new" / "folder") == path
    assert len(host.asked) == 1


def test_an_archive_is_unpacked_and_nothing_else_stays(host, tmp_path):
    path = get(entry(host, "/archive", md5(host.files["/archive"])), tmp_path)
    assert path.read_bytes() == H5AD
    assert [file.name for file in tmp_path.iterdir()] == ["toy.h5ad"]


@pytest.mark.parametrize("path", ["/plain.h5ad", "/archive"])
def test_cuts_are_continued_by_range_requests(host, tmp_path, path):
    host.cut_after = [1000, 500]
    assert get(entry(host, path, md5(host.files[path])), tmp_path).read_bytes() == H5AD
    assert host.asked == [None, "bytes=1000-", "bytes=1500-"]


def test_a_later_call_continues_what_an_earlier_one_left(host, tmp_path):
    host.cut_after = [70_000]
    host.status = [200, 503, 503]
    dataset = entry(host, "/plain.h5ad", md5(H5AD))
    with pytest.raises(PerturbZooError, match=r"HTTP 503.*70,000 bytes are kept in .*toy\.h5ad\.part"):
        get(dataset, tmp_path)
    assert not (tmp_path / "toy.h5ad").exists()
    assert get(dataset, tmp_path).read_bytes() == H5AD
    assert host.asked[-1] == "bytes=70000-"


def test_a_complete_part_needs_no_more_bytes(host, tmp_path):
    (tmp_path / "toy.h5ad.part").write_bytes(H5AD)
    assert get(entry(host, "/plain.h5ad"), tmp_path).read_bytes() == H5AD


def test_a_part_longer_than_the_file_is_started_over(host, tmp_path):
    (tmp_path / "toy.h5ad.part").write_bytes(H5AD + b"more")
    assert get(entry(host, "/plain.h5ad"), tmp_path).read_bytes() == H5AD


def test_a_host_without_ranges_starts_over(host, tmp_path):
    host.ranges, host.cut_after = False, [1000]
    assert get(entry(host, "/plain.h5ad", md5(H5AD)), tmp_path).read_bytes() == H5AD


def test_a_wrong_checksum_leaves_nothing_behind(host, tmp_path):
    with pytest.raises(PerturbZooError, match=r"not the published file \(md5:0+\) and was deleted"):
        get(entry(host, "/plain.h5ad", "md5:" + "0" * 32), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_another_file_is_noticed_by_the_checksum(host, tmp_path):
    (tmp_path / "toy.h5ad.part").write_bytes(b"x" * 1000)
    dataset = entry(host, "/plain.h5ad", md5(H5AD))
    with pytest.raises(PerturbZooError, match="not the published file"):
        get(dataset, tmp_path)
    assert get(dataset, tmp_path).read_bytes() == H5AD


def test_without_a_checksum_the_archive_vouches_for_itself(host, tmp_path):
    damaged = bytearray(host.files["/archive"])
    damaged[len(damaged) // 2] ^= 0xFF
    host.files["/archive"] = bytes(damaged)
    with pytest.raises(PerturbZooError, match="damaged"):
        get(entry(host, "/archive"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def says_what_to_do(message: str, dataset: PublicDataset, folder: Path) -> bool:
    target = folder / ("toy.zip" if dataset.member else "toy.h5ad")
    return f"download {dataset.address} in a browser and save it as {target}" in message and "\n" not in message


def test_a_missing_file_is_said_at_once(host, tmp_path):
    dataset = replace(entry(host, "/archive"), address=host.address + "/gone")
    with pytest.raises(PerturbZooError, match="HTTP 404") as caught:
        get(dataset, tmp_path)
    assert says_what_to_do(str(caught.value), dataset, tmp_path)
    assert len(host.asked) == 1


@pytest.mark.parametrize("challenge", ["HTTP 202", "a page"])
def test_a_host_that_wants_a_browser(host, tmp_path, challenge):
    if challenge == "a page":
        host.content_type = "text/html; charset=utf-8"
    else:
        host.status = [202]
    dataset = entry(host, "/archive")
    with pytest.raises(PerturbZooError, match="wants a browser") as caught:
        get(dataset, tmp_path)
    assert says_what_to_do(str(caught.value), dataset, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["/plain.h5ad", "/archive"])
def test_offline_it_says_which_file_to_put_where_and_takes_it_from_there(host, tmp_path, path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        address = f"http://127.0.0.1:{closed.getsockname()[1]}{path}"
        dataset = replace(entry(host, path, md5(host.files[path])), address=address)
        with pytest.raises(PerturbZooError, match=r"no connection to 127\.0\.0\.1") as caught:
            get(dataset, tmp_path)
        assert says_what_to_do(str(caught.value), dataset, tmp_path)
        (tmp_path / ("toy.zip" if dataset.member else "toy.h5ad")).write_bytes(host.files[path])
        assert get(dataset, tmp_path).read_bytes() == H5AD


def test_a_wrong_file_put_there_by_hand_is_named(host, tmp_path):
    (tmp_path / "toy.zip").write_bytes(b"something else")
    with pytest.raises(PerturbZooError, match=r"toy\.zip: not the file"):
        get(entry(host, "/archive", md5(host.files["/archive"])), tmp_path)
    (tmp_path / "toy.h5ad").write_bytes(b"<html>")
    with pytest.raises(PerturbZooError, match=r"toy\.h5ad: not an h5ad file"):
        get(entry(host, "/archive"), tmp_path)


def test_an_archive_of_something_else_is_refused(host, tmp_path):
    host.files["/archive"] = zipped({"readme.txt": b"hello"})
    with pytest.raises(PerturbZooError, match=r"holds no perturb_processed\.h5ad"):
        get(entry(host, "/archive"), tmp_path)


def test_a_folder_that_cannot_be_written(host, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PerturbZooError, match=r"cannot write to .*PERTURBZOO_CACHE"):
        get(entry(host, "/plain.h5ad"), tmp_path / "file")


def test_a_full_disk_leaves_no_half_file(host, tmp_path, monkeypatch):
    def full(packed: object, file: io.BufferedWriter, length: int) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", full)
        with pytest.raises(PerturbZooError, match="No space left on device; make room"):
            get(entry(host, "/archive"), tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["toy.zip"]
    # what was downloaded is not lost
    assert get(entry(host, "/archive"), tmp_path).read_bytes() == H5AD
    assert len(host.asked) == 1


def test_progress_is_shown_unless_switched_off(host, tmp_path, capsys):
    fetch(entry(host, "/plain.h5ad"), tmp_path / "shown")
    assert "toy.h5ad: 100%" in capsys.readouterr().err
    fetch(entry(host, "/plain.h5ad"), tmp_path / "silent", progress=False)
    assert capsys.readouterr().err == ""


def test_the_cache_folder_comes_from_the_environment(host, tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURBZOO_CACHE", str(tmp_path / "cache"))
    assert fetch(entry(host, "/plain.h5ad"), progress=False) == tmp_path / "cache" / "toy.h5ad"


def test_an_unknown_name_suggests_a_near_one(tmp_path):
    with pytest.raises(PerturbZooError, match="did you mean 'norman'"):
        fetch("normn", tmp_path)


def test_the_table_claims_nothing_it_does_not_know():
    """Checksums are well-formed where they are given at all, and every address that was not tried says so."""
    assert {
        "norman",
        "adamson",
        "dixit",
        "replogle_k562_essential",
        "replogle_k562_gwps",
        "replogle_rpe1",
        "vcc2025",
        "open_problems",
        "kang",
    } == set(DATASETS)
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        assert dataset.address.startswith("https://")
        assert dataset.verified or "not tried" in dataset.note
        if dataset.checksum is None:
            assert "No published md5" in dataset.note
        else:
            assert len(bytes.fromhex(dataset.checksum.removeprefix("md5:"))) == 16
            assert "md5:" in dataset.note
