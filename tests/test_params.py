import copy
import datetime
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm.errors import UserError
from ddpm.params_file import load_params
from ddpm.paths import project_root

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "params.yaml"
VALID = yaml.safe_load(COMMITTED.read_text())
GONE = object()


def mutated(changes: dict[str, object]) -> dict:
    """The committed params with each key path in `changes` set to its value, or removed where that is GONE."""
    params = copy.deepcopy(VALID)
    for path, value in changes.items():
        *sections, key = path.split(".")
        section = params
        for name in sections:
            section = section[name]
        if value is GONE:
            del section[key]
        else:
            section[key] = value
    return params


def leaves(section: dict, prefix: str = "") -> list[str]:
    paths = []
    for key, value in section.items():
        paths += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return paths


def fault_lines(path: Path) -> list[str]:
    """The lines of the error that `path` gives, each without the file's name, which all must begin with."""
    with pytest.raises(UserError) as caught:
        load_params(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(str(path)) for line in lines)
    return [line.removeprefix(str(path)).removeprefix(": ") for line in lines]


def test_committed_params_load_as_they_are():
    params = load_params(COMMITTED)
    assert params.model_dump() == VALID
    assert len(leaves(VALID)) <= 44


def test_every_knob_says_what_it_is():
    lines = [line for line in COMMITTED.read_text().splitlines() if re.match(r"\s+\w+:\s*[^\s#]", line)]
    assert len(lines) == len(leaves(VALID))
    assert [line for line in lines if not re.search(r"\s#\s\S", line)] == []


def test_params_are_frozen():
    params = load_params(COMMITTED)
    with pytest.raises(ValueError, match="frozen"):
        params.train.steps = 1


@pytest.mark.parametrize(
    "changes",
    [
        {"sample.classes": "none"},
        {"sample.classes": [0, 7, 7]},
        {"sample.steps": 1000},
        {"sample.guidance_scale": 3},
        {"sample.guidance_interval": None},
        {"sample.guidance_interval": [0, 0.5]},
        {"train.label_dropout": 0, "sample.guidance_scale": 1},
        {"train.label_dropout": 1, "sample.classes": "none"},
        {"train.diffusion.min_snr_gamma": None},
        {"train.model.channels": [8], "train.model.attention": [14], "train.model.heads": 8},
        {"train.model.patch_size": 1, "train.model.channels": [8, 16, 24], "train.model.attention": [28, 14, 7]},
        {"train.model.attention": []},
        {"train.warmup_steps": 0},
        {"runtime.device": "cuda:1"},
        {"runtime.compile": False},
        {"runtime.processes": 4, "runtime.accumulate": 2},
        {"runtime.state_seconds": 0},
        {"runtime.state_seconds": 0.5},
        {"data.folder": "/data"},
        {"data.name": "MNIST", "data.folder": "~/mnist"},
        {"data.name": "tiles.64", "data.folder": "/t", "train.model.attention": [16], "train.model.channels": [8] * 5},
    ],
    ids=str,
)
def test_limits_that_are_allowed(tmp_path, changes):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(mutated(changes)))
    assert load_params(path).model_dump() == mutated(changes)


CHANNELS = "should be a list of 1 to 5 multiples of 8, at most 4096"
INTERVAL = "should be null or a list of two noise levels, such as [0.2, 3.2]"
CLASSES = "should be all, none or a list of class numbers, which start at 0"
DEVICE = "should be auto, cpu, mps, cuda or, for example, cuda:1"
FAULTS: list[tuple[dict[str, object], list[str]]] = [
    # missing, unknown, misplaced
    ({"sample": GONE}, ["sample: missing"]),
    ({"train.steps": GONE}, ["train.steps: missing"]),
    ({"train.model": GONE}, ["train.model: missing"]),
    ({"train.model.heads": GONE, "runtime.device": GONE}, ["train.model.heads: missing", "runtime.device: missing"]),
    ({"train.stepps": 1}, ["train.stepps: there is no such key; did you mean steps?"]),
    ({"train.model.head": 4}, ["train.model.head: there is no such key; did you mean heads?"]),
    ({"sampel": {}}, ["sampel: there is no such key; did you mean sample?"]),
    ({"sample.wobble": 1}, ["sample.wobble: there is no such key"]),
    ({"train.a\nb": 1}, ["train.'a\\nb': there is no such key"]),
    ({"train": None}, ["train: null should be a section of keys"]),
    ({"train.model": [1]}, ["train.model: [1] should be a section of keys"]),
    ({"sample.guidance_interval": GONE}, ["sample.guidance_interval: missing"]),
    ({"sample.guidance_interval": 3}, [f"sample.guidance_interval: 3 {INTERVAL}"]),
    ({"sample.guidance_interval": [1]}, [f"sample.guidance_interval: [1] {INTERVAL}"]),
    ({"sample.guidance_interval": [-1, 1]}, [f"sample.guidance_interval: [-1, 1] {INTERVAL}"]),
    ({"sample.guidance_interval": [0, math.inf]}, [f"sample.guidance_interval: [0, inf] {INTERVAL}"]),
    (
        {"sample.guidance_interval": [3.2, 0.2]},
        ["sample.guidance_interval: [3.2, 0.2] should be two noise levels, the lower one first"],
    ),
    # whole numbers
    ({"train.steps": "100"}, ["train.steps: YAML reads '100' as text; write it as 100"]),
    ({"train.steps": "1e3"}, ["train.steps: YAML reads '1e3' as text; write it as 1000"]),
    ({"train.steps": "many\nof them"}, ["train.steps: 'many\\nof them' should be a whole number"]),
    ({"train.steps": True}, ["train.steps: true should be a whole number"]),
    ({"train.steps": 100.0}, ["train.steps: 100.0 should be a whole number"]),
    ({"train.steps": None}, ["train.steps: null should be a whole number"]),
    ({"train.steps": [1]}, ["train.steps: [1] should be a whole number"]),
    ({"train.steps": 0}, ["train.steps: 0 should be at least 1"]),
    ({"train.steps": -5}, ["train.steps: -5 should be at least 1"]),
    ({"train.steps": 10**9}, ["train.steps: 1000000000 should be at most 10000000"]),
    ({"train.steps": 10**50}, ["train.steps: 100000000000000000...0000000000000000000 should be at most 10000000"]),
    (
        {"train.batch_size": 9, "runtime.processes": 2, "runtime.accumulate": 5},
        ["train.batch_size: 9 images are too few for 2 processes in 5 parts each; lower runtime.processes or runtime.accumulate"],
    ),
    ({"train.batch_size": 60_001}, ["train.batch_size: 60001 should be at most 60000"]),
    ({"train.seed": -1}, ["train.seed: -1 should be at least 0"]),
    ({"sample.seed": 2**32}, ["sample.seed: 4294967296 should be less than 4294967296"]),
    ({"sample.count": 9}, ["sample.count: 9 should be at least 10"]),
    ({"train.diffusion.timesteps": 1}, ["train.diffusion.timesteps: 1 should be at least 4"]),
    # numbers
    ({"train.learning_rate": "2e-4"}, ["train.learning_rate: YAML reads '2e-4' as text; write it as 0.0002"]),
    ({"train.learning_rate": "1e-300"}, ["train.learning_rate: '1e-300' should be a number"]),
    ({"train.learning_rate": "fast"}, ["train.learning_rate: 'fast' should be a number"]),
    ({"train.learning_rate": True}, ["train.learning_rate: true should be a number"]),
    ({"train.learning_rate": math.nan}, ["train.learning_rate: nan should be a finite number"]),
    ({"train.weight_decay": math.inf}, ["train.weight_decay: inf should be a finite number"]),
    ({"train.learning_rate": 0}, ["train.learning_rate: 0 should be greater than 0"]),
    ({"train.learning_rate": -0.1}, ["train.learning_rate: -0.1 should be greater than 0"]),
    ({"train.learning_rate": 1e10}, ["train.learning_rate: 10000000000.0 should be at most 1"]),
    ({"train.ema_decay": 1}, ["train.ema_decay: 1 should be less than 1"]),
    ({"train.diffusion.min_snr_gamma": 0}, ["train.diffusion.min_snr_gamma: 0 should be greater than 0"]),
    ({"sample.eta": 1.5}, ["sample.eta: 1.5 should be at most 1"]),
    # words
    ({"train.precision": "float16"}, ["train.precision: 'float16' should be 'auto', 'float32' or 'bfloat16'"]),
    ({"train.diffusion.schedule": None}, ["train.diffusion.schedule: null should be 'linear', 'cosine' or 'sigmoid'"]),
    ({"sample.sampler": "plms"}, ["sample.sampler: 'plms' should be 'ddpm', 'ddim' or 'dpmpp_2m'"]),
    ({"sample.clip": 1}, ["sample.clip: 1 should be true or false"]),
    ({"evaluate.classifier": 5}, ["evaluate.classifier: 5 should be text"]),
    ({"runtime.compile": "yes"}, ["runtime.compile: 'yes' should be auto, true or false"]),
    ({"runtime.compile": 1}, ["runtime.compile: 1 should be auto, true or false"]),
    ({"runtime.processes": 0}, ["runtime.processes: 0 should be at least 1"]),
    ({"runtime.processes": "all"}, ["runtime.processes: 'all' should be a whole number"]),
    ({"runtime.accumulate": 0}, ["runtime.accumulate: 0 should be at least 1"]),
    ({"runtime.state_seconds": -1}, ["runtime.state_seconds: -1 should be at least 0"]),
    ({"runtime.state_seconds": True}, ["runtime.state_seconds: true should be a number"]),
    ({"runtime.state_seconds": "1m"}, ["runtime.state_seconds: '1m' should be a number"]),
    ({"runtime.deterministic": 1}, ["runtime.deterministic: 1 should be true or false"]),
    ({"runtime.require_mlflow": "no"}, ["runtime.require_mlflow: 'no' should be true or false"]),
    ({"runtime.device": "gpu"}, [f"runtime.device: 'gpu' {DEVICE}"]),
    ({"runtime.device": "cuda:"}, [f"runtime.device: 'cuda:' {DEVICE}"]),
    ({"runtime.device": 0}, [f"runtime.device: 0 {DEVICE}"]),
    # the network
    ({"train.model.patch_size": 3}, ["train.model.patch_size: 3 should be 1, 2 or 4"]),
    ({"train.model.patch_size": True}, ["train.model.patch_size: true should be 1, 2 or 4"]),
    ({"train.model.patch_size": 2.0}, ["train.model.patch_size: 2.0 should be 1, 2 or 4"]),
    ({"train.model.channels": []}, [f"train.model.channels: [] {CHANNELS}"]),
    ({"train.model.channels": [48, 100]}, [f"train.model.channels: [48, 100] {CHANNELS}"]),
    ({"train.model.channels": [48, "96"]}, [f"train.model.channels: [48, '96'] {CHANNELS}"]),
    ({"train.model.channels": [0]}, [f"train.model.channels: [0] {CHANNELS}"]),
    ({"train.model.channels": 48}, [f"train.model.channels: 48 {CHANNELS}"]),
    ({"train.model.channels": [8] * 6}, [f"train.model.channels: [8, 8, 8, 8, 8, 8] {CHANNELS}"]),
    (
        {"train.model.channels": [8] * 3},
        ["train.model.channels: 3 levels would halve 14×14 pixels unevenly; use fewer"],
    ),
    ({"train.model.attention": [8]}, ["train.model.attention: no level has resolution 8; there are [14, 7]"]),
    ({"train.model.attention": 7}, ["train.model.attention: 7 should be a list"]),
    ({"train.model.attention": ["7"]}, ["train.model.attention.0: YAML reads '7' as text; write it as 7"]),
    ({"train.model.heads": 5}, ["train.model.heads: 5 heads don't divide 96 channels evenly"]),
    ({"train.model.heads": 5, "train.model.attention": []}, ["train.model.heads: 5 heads don't divide 96 channels evenly"]),
    ({"train.model.heads": 0}, ["train.model.heads: 0 should be at least 1"]),
    # classes
    ({"sample.classes": [3, 256]}, [f"sample.classes: [3, 256] {CLASSES}"]),
    ({"sample.classes": [-1]}, [f"sample.classes: [-1] {CLASSES}"]),
    ({"sample.classes": "some"}, [f"sample.classes: 'some' {CLASSES}"]),
    ({"sample.classes": []}, [f"sample.classes: [] {CLASSES}"]),
    ({"sample.classes": 7}, [f"sample.classes: 7 {CLASSES}"]),
    ({"sample.classes": [True]}, [f"sample.classes: [True] {CLASSES}"]),
    # one section against another
    (
        {"sample.steps": 1001},
        ["sample.steps: 1001 steps, but the model has train.diffusion.timesteps: 1000; use at most as many"],
    ),
    (
        {"sample.guidance_scale": 2, "train.label_dropout": 0},
        ["sample.guidance_scale: 2.0 needs a model that also trained without labels; set train.label_dropout > 0"],
    ),
    (
        {"sample.classes": "none", "train.label_dropout": 0, "sample.guidance_scale": 1},
        ["sample.classes: 'none' needs a model that also trained without labels; set train.label_dropout > 0"],
    ),
    (
        {"train.label_dropout": 1},
        ["sample.classes: train.label_dropout: 1 makes a model without classes; set sample.classes: none"],
    ),
    # several at once: one line each, in the order of the file
    (
        {"train.steps": 0, "sample.samplr": "ddim", "runtime.device": "tpu"},
        [
            "train.steps: 0 should be at least 1",
            "sample.samplr: there is no such key; did you mean sampler?",
            f"runtime.device: 'tpu' {DEVICE}",
        ],
    ),
]


@pytest.mark.parametrize(("changes", "lines"), FAULTS, ids=[lines[0] for _, lines in FAULTS])
def test_a_line_for_each_fault(tmp_path, changes, lines):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(mutated(changes)))
    assert fault_lines(path) == lines


def test_exponent_without_a_point_as_a_person_writes_it(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(r"learning_rate: [\d.]+", "learning_rate: 2e-4", COMMITTED.read_text()))
    assert fault_lines(path) == ["train.learning_rate: YAML reads '2e-4' as text; write it as 0.0002"]


SECTIONS = "has no sections; it needs data, train, sample, evaluate, runtime"
UNREADABLE = "not YAML (unreadable characters or values)"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", SECTIONS),
        (b"# nothing but a comment\n", SECTIONS),
        (b"- train\n- sample\n", SECTIONS),
        (b"train:\n  steps: 1\n  seed: 0: 1\n", ", line 3: not YAML (mapping values are not allowed here)"),
        (b"train:\n\tsteps: 1\n", ", line 2: not YAML (found character '\\t' that cannot start any token)"),
        (b"train:\n  steps: 1\n  seed: 0\n  steps: 2\n", ", line 4: not YAML (duplicate key steps)"),
        (b"a: 1\n? [b]\n: 1\n", ", line 2: not YAML (found unhashable key)"),
        (b"train: 1\n---\nsample: 1\n", ", line 2: not YAML (but found another document)"),
        (b"train: !colour red\n", ", line 1: not YAML (could not determine a constructor for the tag '!colour')"),
        (b"train: 2020-99-99\n", UNREADABLE),
        (b"train: !!bool perhaps\n", UNREADABLE),
        (b"train: " + b"[" * 500, UNREADABLE),
        (b"train: \x00\n", UNREADABLE),
        ("# naïve\n".encode("latin-1"), "not a text file in UTF-8"),
        (b"\x89PNG\r\n\x1a\n\xff", "not a text file in UTF-8"),
    ],
)
def test_files_that_are_no_params(tmp_path, content, line):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    assert fault_lines(path) == [line]


def test_no_file_and_a_folder(tmp_path):
    assert fault_lines(tmp_path / "params.yaml") == ["there is no such file here; run from the repository's root"]
    assert fault_lines(tmp_path) == ["can't be read (Is a directory)"]


def test_a_number_too_long_to_print(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(COMMITTED.read_text().replace(f"steps: {VALID['train']['steps']} ", f"steps: 0x{'f' * 5000} "))
    assert fault_lines(path) == ["train.steps: this number should be at most 10000000"]


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=5)
    | st.sampled_from(["all", "none", "auto", "cpu", "1e3", "2e-4", "nan", "[", "", 0, 1, 2, 8, 1.0, datetime.date(2020, 1, 1)])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def disturbed(draw) -> dict:
    """The committed params after a few random replacements, removals and additions of keys at any depth."""
    params = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 4))):
        section = params
        while inner := [value for value in section.values() if isinstance(value, dict)]:
            if draw(st.integers(0, 3)) == 0:
                break
            section = draw(st.sampled_from(inner))
        action = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add"]))
        if action == "add" or not section:
            section[draw(st.text(max_size=8) | st.integers() | st.sampled_from(["step", "str", "list[int]"]))] = draw(VALUES)
            continue
        key = draw(st.sampled_from(list(section)))
        if action == "replace":
            section[key] = draw(VALUES)
        else:
            del section[key]
    return params


@settings(max_examples=120, deadline=None, derandomize=True)
@given(params=disturbed())
def test_any_params_load_unchanged_or_are_refused(tmp_path_factory, params):
    path = tmp_path_factory.getbasetemp() / "disturbed.yaml"
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    try:
        loaded = load_params(path)
    except UserError as error:
        lines = str(error).splitlines()
        assert lines
        assert all(line.startswith(f"{path}: ") for line in lines)
        assert len(set(lines)) == len(lines)
    else:
        assert loaded.model_dump() == params


def test_project_root_is_dvcs_where_dvc_has_one(tmp_path, monkeypatch):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert project_root() == ROOT
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert project_root() == ROOT
    (tmp_path / ".dvc").write_text("a file is no repository")
    assert project_root() == ROOT
    (tmp_path / ".dvc").unlink()
    (tmp_path / ".dvc").mkdir()
    assert project_root() == tmp_path.resolve()


IMPORT = """
try:
    import library
except ImportError:
    print("without", flush=True)
"""
COLLECTION = """
class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
        print("more", flush=True)
Dying()
"""


@pytest.mark.parametrize(("code", "said"), [(IMPORT, "the whole library\n"), (COLLECTION, "")], ids=["import", "collection"])
def test_a_signal_in_an_import_or_in_the_collection_of_garbage(tmp_path, code, said):
    """A whole import: one that was cut short kept a lock, or passed for one of a library that isn't there."""
    (tmp_path / "library.py").write_text(
        "import signal, time\n"
        "try:\n    signal.raise_signal(signal.SIGTERM)\n    time.sleep(0.2)\nexcept BaseException:\n    raise ImportError\n"
        "print('the whole library', flush=True)\n"
    )
    block = textwrap.indent(f"{code}\ntime.sleep(20)\n", "    ")
    program = f"import signal, time\nfrom ddpm.runtime.cli import clean_errors\nwith clean_errors():\n{block}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(tmp_path)])}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, said, "Stopped. Run the same command again to resume.\n")


def test_a_program_ends_after_its_threads_and_exit_handlers():
    """As an interpreter does that takes its modules down."""
    program = """
import atexit, threading, time
from ddpm.errors import UserError
from ddpm.runtime.cli import clean_errors
with clean_errors():
    atexit.register(print, "handler")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    raise UserError("reason")
"""
    command, environment = [sys.executable, "-c", program], {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "thread\nhandler\n", "error: reason\n")
    full = Path("/dev/full")
    if full.exists():  # a disk that has no room for what was printed
        program = 'from ddpm.runtime.cli import clean_errors\nwith clean_errors():\n    print("text")'
        command = [sys.executable, "-c", program]
        assert subprocess.run(command, env=environment, stdout=full.open("w"), check=False).returncode == 1


def test_a_second_ctrl_c_ends_at_once_but_completes_an_import(tmp_path):
    (tmp_path / "library.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(0.2)\nprint('the whole library', flush=True)\n"
    )
    program = """
import signal, time
from ddpm.runtime.cli import clean_errors, stop_signals
with clean_errors(), stop_signals() as received:
    signal.raise_signal(signal.SIGINT)
    print(received, flush=True)
    import library
    time.sleep(20)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(tmp_path)])}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    said = "[2]\nthe whole library\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, said, "Stopped. Run the same command again to resume.\n")
