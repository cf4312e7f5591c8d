import os
import pickle
import platform
import stat
import subprocess
import sys

import pytest
import torch

from ddpm.errors import UserError
from ddpm.files import file_sha256, sha256, write_atomic
from ddpm.tensor_files import load_tensors, read_verified, serialise, write_verified

WEIGHTS = {"weights": {"layer": torch.arange(4096.0).view(64, 64)}, "width": 64}


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_hashes_are_sha256(tmp_path):
    # FIPS 180-2, appendix B.1
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(b"abc") == file_sha256(tmp_path / "abc") == abc


def test_write_makes_folders_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomic(path, b"first, and longer")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert names(path.parent) == ["file.bin"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_written_files_have_ordinary_permissions(tmp_path):
    write_atomic(tmp_path / "ours", b"")
    (tmp_path / "ordinary").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


def test_a_reader_of_the_old_file_keeps_it_whole(tmp_path):
    path = tmp_path / "file.bin"
    write_atomic(path, b"old" * 1000)
    with path.open("rb") as reader:
        assert reader.read(3) == b"old"
        write_atomic(path, b"new")
        assert reader.read() == b"old" * 999


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"kept")
    path = tmp_path / "file" / "child.bin"
    with pytest.raises(UserError) as caught:
        write_atomic(path, b"data")
    assert str(caught.value) in (f"{path}: can't be written (Not a directory)", f"{path}: can't be written (File exists)")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_a_target_that_is_a_folder_leaves_no_temporary_file(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError) as caught:
        write_atomic(tmp_path / "taken", b"data")
    assert str(caught.value) == f"{tmp_path / 'taken'}: can't be written (Is a directory)"
    assert names(tmp_path) == ["taken"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")  # noqa: PTH110
def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")
    (tmp_path / f".file.bin.{platform.node()}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError) as caught:
        write_atomic(path, b"new")
    assert str(caught.value) == f"{path}: can't be written (No space left on device)"
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_remains_of_killed_processes_go_and_of_live_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".file.bin.{platform.node()}.{dead.pid}.tmp"
    stay = [f".file.bin.{platform.node()}.{os.getppid()}.tmp", f".file.bin.elsewhere.{dead.pid}.tmp", ".file.txt.1.tmp"]
    for path in (left, *(tmp_path / name for name in stay)):
        path.write_bytes(b"half")
    write_atomic(tmp_path / "file.bin", b"data")
    assert names(tmp_path) == sorted([*stay, "file.bin"])


def test_verified_data_comes_back_or_not_at_all(tmp_path):
    path = tmp_path / "data"
    assert read_verified(path) is None
    write_verified(path, WEIGHTS)
    read = read_verified(path)
    assert read["width"] == 64 and torch.equal(read["weights"]["layer"], WEIGHTS["weights"]["layer"])
    whole = path.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], whole + b"\0", flip(whole, 0), flip(whole, 200)):
        path.write_bytes(damaged)
        assert read_verified(path) is None


def test_serialised_bytes_do_not_depend_on_the_file(tmp_path):
    for name in ("one.pth", "two.pt"):
        write_atomic(tmp_path / name, serialise(WEIGHTS))
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "two.pt").read_bytes()
    other = {**WEIGHTS, "width": 65}
    assert serialise(other) != serialise(WEIGHTS)


def test_tensors_come_back_equal(tmp_path):
    write_atomic(tmp_path / "w.pth", serialise(WEIGHTS))
    content = load_tensors(tmp_path / "w.pth", {"weights", "width"}, "`make w` makes it")
    assert content.keys() == WEIGHTS.keys()
    assert content["width"] == 64
    assert torch.equal(content["weights"]["layer"], WEIGHTS["weights"]["layer"])


WHOLE = serialise(WEIGHTS)
DAMAGED = "corrupt, or not a plain weights file; `make w` makes it"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK",
        b"no weights at all\n" * 100,
        WHOLE[: len(WHOLE) // 2],
        WHOLE[:-1],
        flip(WHOLE, len(WHOLE) // 2),  # among the numbers, where only a checksum can tell
        flip(WHOLE, WHOLE.index(b"weights")),
        WHOLE[: (at := WHOLE.index(b"PK\x01\x02") + 10)] + b"\x08" + WHOLE[at + 1 :],  # the directory says: deflated
        pickle.dumps({"weights": 1}, protocol=0),
    ],
    ids=["empty", "signature", "text", "half", "last-byte", "numbers", "key", "method", "bare-pickle"],
)
def test_damaged_weights_are_refused(tmp_path, data):
    path = tmp_path / "w.pth"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_tensors(path, {"weights", "width"}, "`make w` makes it")
    assert str(caught.value) == f"{path}: {DAMAGED}"


def test_no_flipped_bit_changes_what_is_loaded(tmp_path):
    path = tmp_path / "w.pth"
    refused = 0
    for at in range(0, len(WHOLE), len(WHOLE) // 100):
        path.write_bytes(flip(WHOLE, at))
        try:
            content = load_tensors(path, {"weights", "width"}, "`make w` makes it")
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
        else:  # it was in the archive's padding
            assert content["width"] == 64, f"byte {at}"
            assert torch.equal(content["weights"]["layer"], WEIGHTS["weights"]["layer"]), f"byte {at}"
    assert refused > 80  # most of the bytes are numbers


def test_no_file_and_a_folder(tmp_path):
    path = tmp_path / "w.pth"
    with pytest.raises(UserError) as caught:
        load_tensors(path, set(), "`make w` makes it")
    assert str(caught.value) == f"{path}: there is no such file; `make w` makes it"
    path.mkdir()
    with pytest.raises(UserError) as caught:
        load_tensors(path, set(), "`make w` makes it")
    assert str(caught.value) == f"{path}: can't be read (Is a directory)"


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, write):
    path, trace = tmp_path / "w.pth", tmp_path / "the-code-ran"
    write({"weights": Payload(trace), "width": 1}, path)
    with pytest.raises(UserError) as caught:
        load_tensors(path, {"weights", "width"}, "`make w` makes it")
    assert str(caught.value) == f"{path}: {DAMAGED}"
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace)))  # the payload does work
    assert trace.exists()


@pytest.mark.parametrize(
    ("content", "lacks"),
    [
        ([1, 2], "weights, width"),
        (torch.zeros(3), "weights, width"),
        ({}, "weights, width"),
        ({"weights": {}}, "width"),
        ({"state_dict": {}, "width": 3}, "weights"),
    ],
)
def test_other_programs_files_are_refused(tmp_path, content, lacks):
    path = tmp_path / "w.pth"
    write_atomic(path, serialise(content))
    with pytest.raises(UserError) as caught:
        load_tensors(path, {"weights", "width"}, "`make w` makes it")
    assert str(caught.value) == f"{path}: made by another program or version (it lacks {lacks}); `make w` makes it"
