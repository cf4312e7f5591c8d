"""What an unfinished run leaves to go on with: whole or not at all, its own and nobody else's, and not for ever."""

import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import ddpm.tracking  # noqa: F401  (which changes no result)
from ddpm.errors import UserError
from ddpm.runtime.run_folder import KEPT_DAYS, fingerprint, imported_source, lock_folder, run_folder
from ddpm.training.state import load_state, save_state

SRC = Path(__file__).resolve().parents[1] / "src"


def test_the_fingerprint_changes_with_any_file_and_nothing_else(tmp_path):
    def files(folder: str, **contents: str) -> list[Path]:
        (tmp_path / folder).mkdir()
        for name, content in contents.items():
            (tmp_path / folder / name).write_text(content)
        return [tmp_path / folder / name for name in contents]

    base = fingerprint({}, files("base", a="1", b="2"))
    copied = files("elsewhere", a="1", b="2")
    os.utime(copied[0], (0, 0))
    assert fingerprint({}, copied) == base
    other = [
        files("a", a="1 ", b="2"),
        files("b", a="1", b=""),
        files("swapped", a="2", b="1"),
        files("renamed", a="1", c="2"),
        files("fewer", a="1"),
        files("more", a="1", b="2", c=""),
    ]
    assert len({base, *(fingerprint({}, paths) for paths in other)}) == len(other) + 1


def test_the_fingerprint_covers_the_imported_code_that_decides_results():
    own = [path.relative_to(SRC).as_posix() for path in imported_source()]
    assert {"ddpm/__init__.py", "ddpm/files.py", "ddpm/paths.py", "ddpm/runtime/run_folder.py", "ddpm/training/state.py"} <= set(
        own
    )
    assert not any(name.startswith("ddpm/tracking/") for name in own)
    assert own == sorted(own)


def test_the_script_of_a_stage_is_part_of_the_code(monkeypatch):
    script = types.ModuleType("script")
    script.__file__ = str(SRC / "train.py")
    assert SRC / "train.py" not in imported_source()
    monkeypatch.setitem(sys.modules, "script", script)
    assert SRC / "train.py" in imported_source()


HOLDER = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from ddpm.runtime.run_folder import run_folder

with run_folder(Path(sys.argv[2])) as folder:
    print(folder.name, flush=True)
    sys.stdin.read()
"""


def test_two_runs_at_once_have_folders_of_their_own(tmp_path):
    wanted = tmp_path / ".resume" / "abc"
    command = [sys.executable, "-c", HOLDER, str(SRC), str(wanted)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "abc\n"
        with run_folder(wanted) as second, run_folder(wanted) as third:
            assert [second.name, third.name] == ["abc-2", "abc-3"]
            assert second.is_dir() and third.is_dir()
    finally:
        holder.kill()  # a killed run holds nothing either
        holder.communicate()
    with run_folder(wanted) as folder:
        assert folder == wanted
        (folder / "kept").touch()
    with pytest.raises(ZeroDivisionError), run_folder(wanted) as folder:
        assert (folder / "kept").exists()
        raise ZeroDivisionError
    with run_folder(wanted) as folder:
        assert folder == wanted


def test_what_a_killed_run_left_is_gone_on_with_first(tmp_path):
    """Of two runs at once the second was killed; when both are over, its states are not forgotten."""
    (tmp_path / "abc-2").mkdir()
    with run_folder(tmp_path / "abc") as folder, run_folder(tmp_path / "abc") as another:
        assert [folder.name, another.name] == ["abc-2", "abc"]


def test_nobody_touches_a_folder_that_a_run_holds(tmp_path):
    folder = tmp_path / "abc"
    line = f"{folder}: another process is still running this"
    with run_folder(folder), pytest.raises(UserError, match=f"^{line}$"), lock_folder(folder):
        pass
    with lock_folder(folder), run_folder(folder) as another:
        assert another.name == "abc-2"


def aged(folder: Path, days: float) -> Path:
    """A run's folder whose state was written `days` days ago, and its journal."""
    folder.mkdir(exist_ok=True)
    (folder / "journal.jsonl").touch()
    state = folder / "state-00000010.pt"
    state.touch()
    os.utime(state, (time.time() - days * 24 * 3600,) * 2)
    return state


def test_unused_states_are_removed_at_the_end(tmp_path, capsys):
    held = tmp_path / "held"
    command = [sys.executable, "-c", HOLDER, str(SRC), str(held)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        old = [aged(tmp_path / name, KEPT_DAYS + 1) for name in ("abc", "abc-2")]
        newer = aged(tmp_path / "two", KEPT_DAYS + 1).with_name("state-00000020.pt")
        newer.touch()
        kept = [newer, newer.with_name("state-00000010.pt"), aged(held, KEPT_DAYS + 1), aged(tmp_path / "young", KEPT_DAYS - 1)]
        with run_folder(tmp_path / "new"):
            assert not any(state.exists() for state in old)
            assert all(state.exists() for state in kept)
            assert all(state.with_name("journal.jsonl").exists() for state in old)
    finally:
        holder.kill()
        holder.communicate()
    said = [f"removed the states in {state.parent}: that run was not resumed for {KEPT_DAYS} days" for state in old]
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(said)


def test_a_folder_that_can_not_be_made(tmp_path):
    (tmp_path / ".resume").write_text("a file is in the way")
    folder = tmp_path / ".resume" / "0123456789abcdef"
    with pytest.raises(UserError) as caught, run_folder(folder):
        pass
    assert str(caught.value) in (f"{folder}: can't be written (Not a directory)", f"{folder}: can't be written (File exists)")


def state(step: int) -> dict:
    return {"step": step, "weights": torch.full((100,), float(step)), "curve": [{"step": step, "loss": 0.5}]}


def states(folder):
    return sorted(folder.glob("state-*.pt"))


def test_no_state(tmp_path):
    assert load_state(tmp_path) is None
    assert load_state(tmp_path / "nowhere") is None


def test_the_newest_two_states_are_kept_and_the_newest_loaded(tmp_path):
    for step in (5, 40, 300, 1000):
        save_state(tmp_path, step, state(step))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["state-00000300.pt", "state-00001000.pt"]
    loaded = load_state(tmp_path)
    assert torch.equal(loaded.pop("weights"), state(1000)["weights"])
    assert loaded == {"step": 1000, "curve": [{"step": 1000, "loss": 0.5}]}


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [truncate, flip, lambda data: b""], ids=["truncated", "flipped", "empty"])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path, capsys, damage):
    for step in (10, 20):
        save_state(tmp_path, step, state(step))
    newest = states(tmp_path)[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    assert load_state(tmp_path)["step"] == 10
    assert capsys.readouterr().err == f"warning: {newest} is corrupt; falling back to the state before it\n"

    oldest = states(tmp_path)[0]
    oldest.write_bytes(damage(oldest.read_bytes()))
    assert load_state(tmp_path) is None


def test_a_state_saved_after_a_damaged_one_is_found(tmp_path):
    for step in (10, 20):
        save_state(tmp_path, step, state(step))
    newest = states(tmp_path)[-1]
    newest.write_bytes(truncate(newest.read_bytes()))
    save_state(tmp_path, 20, state(20))  # a run that fell back to step 10 comes to step 20 again
    assert load_state(tmp_path)["step"] == 20


def test_damaged_states_take_no_place_of_good_ones(tmp_path):
    for step in (200, 210):
        save_state(tmp_path, step, state(step))
    for path in states(tmp_path):
        path.write_bytes(truncate(path.read_bytes()))
    assert load_state(tmp_path) is None
    for step in (10, 20, 30):
        save_state(tmp_path, step, state(step))
        assert load_state(tmp_path)["step"] == step
