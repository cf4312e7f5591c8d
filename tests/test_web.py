"""What the page asks of the server: drawings step by step, strips, files, a queue, and what is refused."""

import asyncio
import base64
import io
import json
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddpm.checkpoint import save_checkpoint
from ddpm.files import file_sha256
from ddpm.params_file import load_params
from ddpm.sampling.batches import draw_images
from ddpm.sampling.pipeline import Pipeline
from ddpm.web.drawing import Drawing, Plan, slerp
from ddpm.web.turns import LONGEST, Busy, ClientLeft, Queue, worked_off
from helpers import free_port, run, served, start

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SAMPLING = load_params(ROOT / "params.yaml").sample
CPU = torch.device("cpu")
BAD = [  # of a query, and what is said of it
    ("count=0", "count: '0' should be at least 1"),
    ("count=101", "count: '101' should be at most 100"),
    ("steps=101", "steps: '101' should be at most 100"),
    ("steps=51", "sample.steps: 51, but "),
    ("sampler=euler", "sampler: 'euler' should be 'ddpm', 'ddim' or 'dpmpp_2m'"),
    ("model=../../etc/passwd", "model: there is no '../../etc/passwd'; /models lists those there are"),
    ("model=experiment/nobody", "model: there is no 'experiment/nobody'; "),
    ("checkpoint=zzz", "checkpoint: 'zzz' should "),
    ("to_seed=3", "classes: a strip starts from one class; give exactly one"),
    ("classes=Bag&to_class=Shoe", "classes: ['Shoe'] should be a list of classes, by name or number; "),
    ("classes=Bag&to_seed=3&count=1", "count: a strip has at least two images"),
    ("cuont=3", "cuont: there is no such key; did you mean count?"),
]


@pytest.fixture(scope="module")
def server(random_model):
    """The address of a real server of a model that has learned nothing."""
    with served(ROOT, str(random_model)) as address:
        yield address


@pytest.fixture(scope="module")
def pipeline(random_model) -> Pipeline:
    return Pipeline(random_model, CPU)


def events(address: str, query: str) -> list[dict]:
    """All events of a drawing."""
    answer = requests.get(f"{address}/draw?{query}", timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]


def tiles(sprite: str, count: int) -> np.ndarray:
    """The images of a sprite, [N, 28, 28] or [N, 16, 16, 3]."""
    with Image.open(io.BytesIO(base64.b64decode(sprite.partition(",")[2]))) as image:
        pixels, size = np.asarray(image).astype(int), image.width // 10
    return np.stack([pixels[i // 10 * size : (i // 10 + 1) * size, i % 10 * size : (i % 10 + 1) * size] for i in range(count)])


def images(pipeline: Pipeline, **wanted) -> np.ndarray:
    """What a drawing ends with, drawn in this process."""
    *_, last = Plan(pipeline, SAMPLING, Drawing(**wanted)).steps()
    return last.x.numpy().astype(int)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_what_is_between_two_noises_is_as_long_as_noise(seed, share):
    a, b = torch.randn(2, 1, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    between = slerp(a, b, torch.tensor([0, share, 1]).view(-1, 1, 1, 1))
    torch.testing.assert_close(between[[0]], a, atol=1e-4, rtol=0)
    torch.testing.assert_close(between[[2]], b, atol=1e-4, rtol=0)
    assert min(a.norm(), b.norm()) * 0.97 < between[1].norm() < max(a.norm(), b.norm()) * 1.03


def test_every_step_arrives_and_the_last_is_what_the_stage_draws(server, random_model, tmp_path):
    drawn = events(server, "classes=Bag&classes=7&count=13&seed=5&steps=4&guidance_scale=2&sampler=ddim")
    assert [event["kind"] for event in drawn] == ["start", *["step"] * 5, "end"]
    assert drawn[0]["names"] == (["Bag", "Sneaker"] * 7)[:13]
    assert [event["number"] for event in drawn[1:-1]] == [0, 1, 2, 3, 4]
    levels = [event["noise_level"] for event in drawn[1:-1]]
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] == 0
    changes = {"classes": [8, 7], "seed": 5, "steps": 4, "guidance_scale": 2.0, "sampler": "ddim", "count": 13}
    expected = draw_images(Pipeline(random_model, CPU), SAMPLING.model_copy(update=changes), tmp_path)
    assert abs(tiles(drawn[-2]["x"], 13) - expected.images.numpy().astype(int)).max() <= 1
    for event, frame in zip(drawn[1:-1], expected.frames, strict=True):
        assert abs(tiles(event["x"], 10) - frame[:10].numpy().astype(int)).max() <= 1
    assert drawn[1]["x0"] is None
    assert (tiles(drawn[-2]["x0"], 13) == tiles(drawn[-2]["x"], 13)).all()  # the last estimate is the sample


@pytest.mark.parametrize(("interval", "scale"), [([0.2, 3.2], 2.0), (None, 2.0), ([0.2, 3.2], 1.0)])
def test_evaluations_are_those_that_the_network_makes(pipeline, interval, scale):
    seen = []
    hook = pipeline.model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    sampling = SAMPLING.model_copy(update={"guidance_interval": interval})
    *_, last = Plan(pipeline, sampling, Drawing(count=3, steps=8, guidance_scale=scale)).steps()
    hook.remove()
    assert last.evaluations == sum(seen) / 3


def test_a_strip_leads_from_one_class_to_the_other(pipeline):
    strip = images(pipeline, classes=["Bag"], to_class="Sneaker", count=6, seed=3, steps=4)
    for end, name in ((0, "Bag"), (-1, "Sneaker")):
        alone = images(pipeline, classes=[name], count=1, seed=3, steps=4)[0]
        assert abs(strip[end] - alone).max() <= 1
    between = abs(np.diff(strip, axis=0)).mean((1, 2))
    assert between.max() < abs(strip[0] - strip[-1]).mean()


def test_a_strip_leads_from_one_seed_to_the_other(pipeline):
    strip = images(pipeline, classes=["Bag"], to_seed=9, count=6, seed=3, steps=4)
    for end, seed in ((0, 3), (-1, 9)):
        alone = images(pipeline, classes=["Bag"], count=1, seed=seed, steps=4)[0]
        assert abs(strip[end] - alone).max() <= 1


def test_files_hold_the_drawing_and_the_model_that_made_it(server, random_model):
    query = "classes=Coat&count=12&seed=8&steps=3"
    drawn = tiles(events(server, query)[-2]["x"], 12)
    answer = requests.get(f"{server}/drawing.npz?{query}", timeout=60)
    checkpoint = file_sha256(random_model)
    assert answer.headers["content-disposition"] == f'attachment; filename="drawing-{checkpoint[:12]}-8.npz"'
    with np.load(io.BytesIO(answer.content)) as archive:
        assert (archive["images"] == drawn).all()
        assert archive["labels"].tolist() == [4] * 12
        assert str(archive["checkpoint_sha256"]) == checkpoint
    with Image.open(io.BytesIO(requests.get(f"{server}/drawing.png?{query}", timeout=60).content)) as sheet:
        pixels = np.asarray(sheet).astype(int)
    assert (pixels[2:58:2, 2:58:2] == drawn[0]).all()
    with Image.open(io.BytesIO(requests.get(f"{server}/drawing.gif?{query}", timeout=60).content)) as animation:
        assert animation.n_frames == 4
    assert requests.get(f"{server}/drawing.exe?{query}", timeout=60).status_code == 422


@pytest.mark.parametrize("path", ["draw", "drawing.png", "nearest"])
@pytest.mark.parametrize(("query", "message"), BAD)
def test_a_bad_query_is_told_in_one_line(server, path, query, message):
    answer = requests.get(f"{server}/{path}?{query}{'&index=0' if path == 'nearest' else ''}", timeout=30)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(message)


def test_a_drawing_that_would_take_too_much_memory_is_refused(pipeline):
    pipeline = Pipeline(pipeline.file, CPU)
    pipeline.image_shape = (3, 256, 256)
    with pytest.raises(Exception, match=r"^count: 100 images in 50 steps are too many at once; ask for fewer$"):
        Plan(pipeline, SAMPLING, Drawing(count=100, steps=50))


def test_another_model_is_announced_and_does_not_draw(random_model, tmp_path):
    """The file is replaced while the server runs, as by `dvc repro`."""
    model = tmp_path / "model.pth"
    shutil.copy(random_model, model)
    with served(ROOT, str(model)) as address:
        before = requests.get(f"{address}/about?model=file", timeout=60).json()["checkpoint"]
        assert before == file_sha256(model)[:12]
        query = f"model=file&count=2&steps=2&checkpoint={before}"
        assert events(address, query)[-1]["kind"] == "end"
        content = torch.load(model, weights_only=True)
        weights = {name: w * 1.5 for name, w in content["weights"].items()}
        save_checkpoint(model, weights, content["unet"], content["diffusion"], 0.1)
        now = file_sha256(model)[:12]
        answer = requests.get(f"{address}/draw?{query}", timeout=60)
        assert answer.status_code == 409
        assert answer.json()["error"] == f"{model} is another model now ({now}) than the one of this address ({before})"
        assert events(address, query.replace(before, now))[0]["checkpoint"] == now


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "10.0.0.7:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": socket.gethostname()}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
    ],
)
def test_pages_of_other_servers_may_not_use_it(server, headers, status):
    for path in ("about", "draw?count=1&steps=1", ""):
        answer = requests.get(f"{server}/{path}", headers=headers, timeout=60)
        assert answer.status_code == status
        if status == 403:
            assert answer.json()["error"].startswith("Origin: " if "Origin" in headers else "Host: ")


def test_whoever_opens_it_to_others_is_warned(random_model):
    command = ("python", "src/serve.py", str(random_model), "--host", "0.0.0.0", "--port", str(free_port()))
    process = start(ROOT, *command)
    assert process.stderr.readline().startswith("warning: whoever reaches 0.0.0.0 port ")
    process.terminate()
    process.communicate(timeout=30)
    command = ["python", "src/serve.py", "--host", "no.such.host"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "error: --host: 'no.such.host' is no address of this machine; 127.0.0.1 and 0.0.0.0 always are\n",
    )


class Client:
    """A client that leaves after so many looks."""

    def __init__(self, looks: int = 1000):
        self.looks = looks

    async def is_disconnected(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_client_that_leaves_ends_its_work():
    made = []

    def work():
        for i in range(100):
            made.append(i)
            yield i

    async def watch():
        async for _ in worked_off(work(), Client(3)):
            pass

    with pytest.raises(ClientLeft):
        asyncio.run(watch())
    assert made == [0, 1, 2]


def test_places_in_the_queue_move_up_when_somebody_leaves():
    async def wait(queue: Queue, told: list[int], client: Client) -> None:
        with queue.place() as place:
            async for ahead in queue.ahead(place, client):
                told.append(ahead)
            told.append(0)

    async def scene() -> tuple[list[int], ...]:
        queue, told = Queue(), ([], [], [])
        with queue.place():
            clients = (Client(), Client(1), Client())
            waiting = [asyncio.create_task(wait(queue, *pair)) for pair in zip(told, clients, strict=True)]
            await asyncio.sleep(0.1)
            (result,) = await asyncio.gather(waiting[1], return_exceptions=True)  # leaves at its second look
            assert isinstance(result, ClientLeft)
            await asyncio.sleep(0.1)
        await asyncio.gather(waiting[0], waiting[2])
        assert queue.places == []
        return told

    first, second, third = asyncio.run(scene())
    assert first == [1, 0]
    assert second == [2]
    assert third == [3, 2, 1, 0] or third == [3, 2, 0]  # the last move may be two at once


def test_a_full_queue_says_so():
    async def scene() -> None:
        queue = Queue()
        places = [queue.place() for _ in range(LONGEST + 1)]
        for place in places:
            place.__enter__()
        with pytest.raises(Busy, match=r"^32 drawings are waiting already; try again later$"), queue.place():
            pass

    asyncio.run(scene())


def test_several_draw_at_once_and_each_gets_its_own(server):
    def ask(seed: int) -> tuple[list, list[int]]:
        drawn = events(server, f"count=20&seed={seed}&steps=20")
        ahead = [event["ahead"] for event in drawn if event["kind"] == "queue"]
        assert ahead == sorted(ahead, reverse=True)
        return [event["x"] for event in drawn if event["kind"] == "step"], ahead

    alone = [ask(seed)[0] for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    assert [pictures for pictures, _ in together] == alone
    assert max(max(ahead, default=0) for _, ahead in together) > 1  # some waited, and were told


def test_whoever_waits_draws_once_the_drawing_ahead_is_left(server):
    with requests.get(f"{server}/draw?count=100&steps=50", stream=True, timeout=60) as first:
        lines = first.iter_lines()
        next(lines)
        with requests.get(f"{server}/draw?count=1&steps=1", stream=True, timeout=60) as second:
            waiting = second.iter_lines()
            assert json.loads(next(waiting).removeprefix(b"data: ")) == {"kind": "queue", "ahead": 1}
            first.close()
            kinds = [json.loads(line.removeprefix(b"data: "))["kind"] for line in waiting if line]
    assert kinds == ["start", "step", "step", "end"]


def test_a_model_of_ones_own_images_has_its_own_classes_in_colour(coloured_run):
    with served(coloured_run) as address:
        about = requests.get(f"{address}/about", timeout=60).json()
        assert about["classes"] == ["blue", "green", "red"]
        assert about["image_shape"] == [3, 16, 16]
        examples = requests.get(f"{address}/examples", timeout=60).json()
        assert examples["real"]
        for example, channel in zip(examples["images"], (2, 1, 0), strict=True):
            with Image.open(io.BytesIO(base64.b64decode(example["png"]))) as image:
                assert np.asarray(image).mean((0, 1)).argmax() == channel
        drawn = events(address, "classes=green&count=3&seed=1")
        assert tiles(drawn[-2]["x"], 3).shape == (3, 16, 16, 3)
        near = requests.get(f"{address}/nearest?classes=green&count=3&seed=1&index=2", timeout=60).json()
        assert near["class"] in about["classes"]
        assert near["distance"] > 0


def test_the_schema_tells_the_truth(server, tmp_path):
    """Whatever the schema allows, and much that it forbids, is answered as it says, and never by a server error.

    Where the schema forbids a value, such as false for a number, pydantic may still read it as a number.
    """
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    options = ("--checks", checks, "--max-examples", "15", "--phases", "fuzzing", "--seed", "0", "--no-color")
    run(tmp_path, "schemathesis", "run", f"{server}/openapi.json", *options)
