import functools
import gzip
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision

from ddpm.data.fashion_mnist import CLASSES, FILES, load_split
from ddpm.data.pixels import to_model_range, to_uint8
from ddpm.errors import UserError
from ddpm.files import file_sha256
from ddpm.sources import download as download_module
from ddpm.sources.download import download

ROOT = Path(__file__).resolve().parents[1]
SMALLEST = "t10k-labels-idx1-ubyte"  # stands for all four where one is enough
ADVICE = "Put the four .gz files (or the unpacked ones) into a folder, set data.folder in params.yaml to it, and run again."


class Mirror(ThreadingHTTPServer):
    """Serves what `answers` holds under a file's name: bytes, or a function of the request's handler; else 404."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.answers: dict[str, bytes | Callable] = {}
        self.asked: list[str] = []
        self.closing = threading.Event()

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.removeprefix("/")
        self.server.asked.append(name)
        answer = self.server.answers.get(name)
        if answer is None:
            self.send_error(404)
        elif callable(answer):
            answer(self)
        else:
            self.begin(len(answer))
            self.wfile.write(answer)

    def begin(self, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.send_header("Content-Encoding", "gzip")  # as some servers say of .gz files: the bytes must stay packed
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror():
    server = Mirror()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.fixture(scope="session")
def packed(fashion_mnist) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress((fashion_mnist / name).read_bytes(), 1) for name in FILES}


@pytest.fixture
def dead() -> str:
    """The address of a mirror where nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}/"


@pytest.fixture
def lacking(tmp_path, fashion_mnist):
    """A function that makes the cache hold all files but those named."""

    def fill(*names: str) -> Path:
        cache = tmp_path / "cache"
        cache.mkdir()
        for name in FILES.keys() - set(names):
            (cache / name).symlink_to((fashion_mnist / name).resolve())
        return cache

    return fill


@pytest.fixture
def raw(tmp_path) -> Path:
    return tmp_path / "data" / "FashionMNIST" / "raw"


def is_complete(folder: Path) -> bool:
    """Whether it holds the four files, right, and nothing else."""
    return {path.name: file_sha256(path) for path in folder.iterdir()} == FILES


def nothing_had(names: list[str], *failures: str) -> str:
    return "\n".join(
        [
            f"Fashion-MNIST could not be downloaded: {', '.join(names)} missing. Tried:",
            *(f"  - {line}" for line in failures),
            ADVICE,
        ]
    )


# --- a download that succeeds


def test_mirror_to_torchvision(tmp_path, raw, mirror, packed, fashion_mnist):
    mirror.answers = packed
    download(raw, tmp_path / "cache", mirrors=[mirror.url], debian=False)
    assert is_complete(raw)
    assert is_complete(tmp_path / "cache")
    assert mirror.asked == list(packed)

    for split, count in (("train", 60_000), ("test", 10_000)):
        images, labels = load_split(raw, split)
        theirs = torchvision.datasets.FashionMNIST(str(tmp_path / "data"), train=split == "train", download=False)
        assert (images.dtype, images.shape, labels.dtype) == (torch.uint8, (count, 28, 28), torch.int64)
        assert torch.equal(images, theirs.data)
        assert torch.equal(labels, theirs.targets)
        assert torch.bincount(labels).tolist() == [count // 10] * 10
    assert [name.split("/")[0] for name in theirs.classes] == [name.split("/")[0] for name in CLASSES]

    shutil.rmtree(raw)
    download(raw, tmp_path / "cache", mirrors=[], debian=False)  # from the cache alone
    assert is_complete(raw)
    assert len(mirror.asked) == 4


@pytest.mark.parametrize("form", ["packed", "unpacked"])
def test_folder(tmp_path, raw, packed, fashion_mnist, mirror, form):
    if form == "packed":
        folder = tmp_path / "folder"
        folder.mkdir()
        for name, content in packed.items():
            (folder / name).write_bytes(content)
    else:
        folder = fashion_mnist
    before = sorted(folder.iterdir())
    download(raw, tmp_path / "cache", folder, [mirror.url], debian=False)
    assert is_complete(raw)
    assert mirror.asked == []
    assert sorted(folder.iterdir()) == before


def test_a_damaged_cache_file_is_fetched_anew(tmp_path, raw, lacking, mirror, packed, fashion_mnist):
    cache = lacking(SMALLEST)
    damaged = bytearray((fashion_mnist / SMALLEST).read_bytes())
    damaged[5000] ^= 1
    (cache / SMALLEST).write_bytes(damaged)
    mirror.answers = packed
    download(raw, cache, mirrors=[mirror.url], debian=False)
    assert mirror.asked == [f"{SMALLEST}.gz"]
    assert is_complete(raw)
    assert is_complete(cache)


def test_wrong_files_in_place_are_replaced(raw, lacking, fashion_mnist):
    raw.mkdir(parents=True)
    (raw / SMALLEST).write_bytes(b"half a file")
    download(raw, lacking(), mirrors=[], debian=False)
    assert is_complete(raw)


def test_a_dead_mirror_gives_way_to_the_next(raw, lacking, mirror, packed, dead, capsys):
    mirror.answers = packed
    download(raw, lacking(SMALLEST), mirrors=[dead, mirror.url], debian=False)
    assert is_complete(raw)
    said = capsys.readouterr().err
    assert f"trying mirror {dead}\n  failed: {SMALLEST}.gz: ConnectionError\ntrying mirror {mirror.url}\n" in said


@pytest.mark.parametrize("held", [[0, 1], [2, 3], [1], [3]], ids=str)
def test_partial_sources_complement_each_other(tmp_path, raw, mirror, packed, fashion_mnist, held):
    names = list(FILES)
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in held:
        (folder / names[i]).symlink_to((fashion_mnist / names[i]).resolve())
    mirror.answers = {f"{name}.gz": packed[f"{name}.gz"] for i, name in enumerate(names) if i not in held}
    download(raw, tmp_path / "cache", folder, [mirror.url], debian=False)
    assert is_complete(raw)
    assert mirror.asked == list(mirror.answers), "the mirror was asked for what the folder has"


def test_one_wrong_file_in_a_folder(tmp_path, raw, mirror, packed, fashion_mnist, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in FILES:
        (folder / name).symlink_to((fashion_mnist / name).resolve())
    wrong = folder / "train-labels-idx1-ubyte"
    wrong.unlink()
    wrong.write_bytes((fashion_mnist / SMALLEST).read_bytes())
    mirror.answers = packed
    download(raw, tmp_path / "cache", folder, [mirror.url], debian=False)
    assert is_complete(raw)
    assert f"{wrong.name} has the wrong bytes (SHA-256 {FILES[SMALLEST][:12]}…, {FILES[wrong.name][:12]}… expected)" in (
        capsys.readouterr().err
    )
    assert mirror.asked == [f"{wrong.name}.gz"], "the mirror was asked for what the folder has"


# --- sources that fail


def half_sent(content: bytes, handler: Handler) -> None:
    handler.begin(len(content))
    handler.wfile.write(content[: len(content) // 2])


def half_sent_without_length(content: bytes, handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])


def never_sent(content: bytes, handler: Handler) -> None:
    handler.server.closing.wait(20)


def half_sent_then_silence(content: bytes, handler: Handler) -> None:
    half_sent(content, handler)
    handler.server.closing.wait(20)


def refused(content: bytes, handler: Handler) -> None:
    handler.send_error(503)


def sent_as(change: Callable[[bytes], bytes], content: bytes, handler: Handler) -> None:
    content = change(content)
    handler.begin(len(content))
    handler.wfile.write(content)


def other_content(content: bytes) -> bytes:
    return gzip.compress(gzip.decompress(content)[:-1] + b"\0")


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


BROKEN_GZIP = "is not a complete gzip file ("


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (half_sent, ": ProtocolError"),
        (half_sent_without_length, f" {BROKEN_GZIP}Compressed file ended before the end-of-stream marker was reached)"),
        (never_sent, ": ReadTimeout"),
        (half_sent_then_silence, ": ReadTimeoutError"),
        (refused, ": HTTP 503 Service Unavailable"),
        (None, ": HTTP 404 Not Found"),
        (functools.partial(sent_as, lambda content: content[:-4]), f" {BROKEN_GZIP}Compressed file ended before the end-of"),
        (functools.partial(sent_as, lambda content: b"<html>not found</html>"), f" {BROKEN_GZIP}Not a gzipped file (b'<h'))"),
        (functools.partial(sent_as, lambda content: b""), " has the wrong bytes (SHA-256 e3b0c44298fc…, "),
        (functools.partial(sent_as, flipped), f" {BROKEN_GZIP}"),
        (functools.partial(sent_as, other_content), " has the wrong bytes (SHA-256 "),
    ],
    ids=[
        "cut", "cut-without-length", "hangs", "hangs-midway", "503", "404", "cut-gzip", "html", "empty", "flipped", "other",
    ],
)  # fmt: skip
def test_a_bad_mirror_is_told_and_passed_over(raw, lacking, mirror, packed, monkeypatch, answer, reason):
    monkeypatch.setattr(download_module, "CONNECT_TIMEOUT", 0.5)
    monkeypatch.setattr(download_module, "READ_TIMEOUT", 0.5)
    if answer:
        mirror.answers[f"{SMALLEST}.gz"] = functools.partial(answer, packed[f"{SMALLEST}.gz"])
    cache = lacking(SMALLEST)
    with pytest.raises(UserError) as caught:
        download(raw, cache, mirrors=[mirror.url], debian=False)
    first, failure, advice = str(caught.value).splitlines()
    assert first == f"Fashion-MNIST could not be downloaded: {SMALLEST} missing. Tried:"
    assert failure.startswith(f"  - mirror {mirror.url}: {SMALLEST}")
    assert reason in failure
    assert advice == ADVICE
    assert sorted(path.name for path in cache.iterdir()) == sorted(FILES.keys() - {SMALLEST})
    assert not raw.exists()

    mirror.answers = packed
    download(raw, cache, mirrors=[mirror.url], debian=False)
    assert is_complete(raw)


def test_every_source_that_failed_is_listed_with_what_to_do(tmp_path, raw, lacking, mirror, dead, monkeypatch):
    folder, nowhere = tmp_path / "folder", tmp_path / "nowhere"
    folder.mkdir()
    (folder / SMALLEST).write_bytes(b"wrong")
    monkeypatch.setenv("PATH", str(nowhere))  # a machine without apt
    cache = lacking(SMALLEST)
    with pytest.raises(UserError) as caught:
        download(raw, cache, folder, [dead, mirror.url])
    assert str(caught.value) == nothing_had(
        [SMALLEST],
        f"folder {folder}: {SMALLEST} has the wrong bytes (SHA-256 8810ad581e59…, {FILES[SMALLEST][:12]}… expected)",
        f"mirror {dead}: {SMALLEST}.gz: ConnectionError",
        f"mirror {mirror.url}: {SMALLEST}.gz: HTTP 404 Not Found",
        "Debian package dataset-fashion-mnist: this machine has no apt-get",
    )
    assert not (cache / SMALLEST).exists()
    assert not raw.exists()


def test_a_folder_of_other_images_is_refused_even_if_the_cache_has_all_files(tmp_path, raw, lacking):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").touch()
    with pytest.raises(UserError) as caught:
        download(raw, lacking(), tmp_path / "photos")
    line = "has none of Fashion-MNIST's four files; for images of yours, choose another data.name"
    assert str(caught.value) == f"data.folder: {tmp_path / 'photos'}: {line}"


@pytest.mark.skipif(not (shutil.which("apt-get") and shutil.which("dpkg-deb")), reason="no apt-get or no dpkg-deb")
def test_the_debian_package_has_the_files(raw, lacking):
    try:
        download(raw, lacking(SMALLEST), mirrors=[])
    except UserError as error:
        reason = next(line for line in str(error).splitlines() if line.startswith("  - "))
        if "apt-get" in reason:  # offline, or a distribution without the package
            pytest.skip(reason.removeprefix("  - "))
        raise
    assert is_complete(raw)


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_killed_download_leaves_nothing_that_looks_finished(tmp_path, raw, mirror, packed):
    names, cache = list(FILES), tmp_path / "cache"
    trickling = threading.Event()

    def trickle(handler: Handler) -> None:
        handler.begin(10**6)
        while not handler.server.closing.wait(0.02):
            handler.wfile.write(b"\x1f")
            trickling.set()

    mirror.answers = {**packed, f"{names[2]}.gz": trickle}
    code = (
        "import sys; from pathlib import Path; from ddpm.sources.download import download\n"
        "raw, cache, url = sys.argv[1:]; download(Path(raw), Path(cache), mirrors=[url], debian=False)"
    )
    process = subprocess.Popen(
        ["python", "-c", code, str(raw), str(cache), mirror.url],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stderr=subprocess.DEVNULL,
    )
    try:
        assert trickling.wait(60)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    finished = [path for path in cache.iterdir() if not path.name.startswith(".")]
    assert {path.name: file_sha256(path) for path in finished} == {name: FILES[name] for name in names[:2]}
    assert not raw.exists()

    mirror.answers, mirror.asked = packed, []
    download(raw, cache, mirrors=[mirror.url], debian=False)
    assert is_complete(raw)
    assert mirror.asked == [f"{name}.gz" for name in names[2:]]


# --- reading


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("t10k-images-idx3-ubyte", lambda content: content[:-1]),
        ("t10k-images-idx3-ubyte", flipped),
        ("t10k-labels-idx1-ubyte", lambda content: b""),
        ("t10k-labels-idx1-ubyte", lambda content: content + b"\0"),
    ],
    ids=["truncated", "flipped", "empty", "longer"],
)
def test_damaged_files_are_refused(tmp_path, fashion_mnist, name, damage):
    for other in FILES:
        (tmp_path / other).symlink_to((fashion_mnist / other).resolve())
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(damage((fashion_mnist / name).read_bytes()))
    with pytest.raises(UserError) as caught:
        load_split(tmp_path, "test")
    again = "not Fashion-MNIST's bytes (SHA-256 differs); `python src/download.py` downloads it again"
    assert str(caught.value) == f"{tmp_path / name}: {again}"
    assert len(load_split(tmp_path, "train")[0]) == 60_000


def test_swapped_files_are_refused(tmp_path, fashion_mnist):
    for name in FILES:
        other = name.replace("t10k", "train") if "t10k" in name else name.replace("train", "t10k")
        (tmp_path / name).symlink_to((fashion_mnist / other).resolve())
    for split, first in (("train", "train-images-idx3-ubyte"), ("test", "t10k-images-idx3-ubyte")):
        with pytest.raises(UserError) as caught:
            load_split(tmp_path, split)
        assert str(caught.value).startswith(f"{tmp_path / first}: not Fashion-MNIST's bytes")


def test_missing_files_are_named(tmp_path, fashion_mnist):
    images = tmp_path / "t10k-images-idx3-ubyte"
    with pytest.raises(UserError) as caught:
        load_split(tmp_path, "test")
    assert str(caught.value) == f"{images}: there is no such file; `python src/download.py` downloads it"
    images.mkdir()
    with pytest.raises(UserError) as caught:
        load_split(tmp_path, "test")
    assert str(caught.value) == f"{images}: can't be read (Is a directory)"
    images.rmdir()
    images.symlink_to((fashion_mnist / images.name).resolve())
    with pytest.raises(UserError) as caught:
        load_split(tmp_path, "test")
    assert str(caught.value) == f"{tmp_path / SMALLEST}: there is no such file; `python src/download.py` downloads it"


def test_pixels_survive_the_models_range():
    images = torch.arange(256, dtype=torch.uint8).repeat_interleave(28 * 28).view(256, 28, 28)
    x = to_model_range(images)
    assert (x.dtype, x.shape) == (torch.float32, (256, 1, 28, 28))
    assert (x.min().item(), x.max().item()) == (-1, 1)
    assert torch.equal(to_uint8(x), images)
    nudged = x + torch.linspace(-0.49, 0.49, 28) / 127.5  # less than half a grey level away
    assert torch.equal(to_uint8(nudged), images)


def test_pixels_out_of_range_are_clipped():
    x = torch.tensor([-1e9, -1.01, 1.01, 1e9]).view(4, 1, 1, 1)
    assert to_uint8(x).flatten().tolist() == [0, 0, 255, 255]
    assert to_uint8(x.bfloat16()).flatten().tolist() == [0, 0, 255, 255]
