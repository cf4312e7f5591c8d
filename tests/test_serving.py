"""Images on request: what may be asked for, and over real HTTP what `src/sample.py` would have drawn."""

import base64
import io
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from ddpm.data.fashion_mnist import CLASSES
from ddpm.errors import UserError
from ddpm.params import SampleParams
from ddpm.params_file import load_params
from ddpm.sampling.batches import draw_images
from ddpm.sampling.pipeline import Pipeline
from ddpm.serving.requests import Request, class_numbers, respond
from helpers import free_port, served

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SAMPLING = load_params(ROOT / "params.yaml").sample
REMEDY = "`dvc repro train` makes models/diffusion_model.pth"
BAD = [  # of a query, and what is said of it
    ("classes=T-shirt", "classes: ['T-shirt'] should be a list of classes, by name or number; did you mean T-shirt/top?"),
    ("classes=Bagg", "classes: ['Bagg'] should be a list of classes, by name or number; did you mean Bag?"),
    ("classes=10", "classes: ['10'] should be a list of classes, by name or number; "),
    ("classes=", "classes: [''] should be a list of classes, by name or number; the classes are T-shirt/top, Tr"),
    ("classes=Bag,Shirt", "classes: ['Bag,Shirt'] should be a list of classes, by name or number; give each class by itself"),
    ("count=0", "count: '0' should be at least 1"),
    ("count=501", "count: '501' should be at most 500"),
    ("count=x", "count: 'x' should be a whole number"),
    ("seed=-1", "seed: '-1' should be at least 0"),
    ("seed=4294967296", "seed: '4294967296' should be less than 4294967296"),
    ("steps=0", "steps: '0' should be at least 1"),
    ("steps=51", "sample.steps: 51, but "),
    ("guidance_scale=nan", "guidance_scale: 'nan' should be "),
    ("guidance_scale=101", "guidance_scale: '101' should be at most 100"),
    ("cuont=3", "cuont: there is no such key; did you mean count?"),
]
BAD_JSON = [
    ('{"classes": []}', "classes: [] should be a list of classes, or left out for all of them"),
    ('{"classes": "Bag"}', "classes: 'Bag' should be a list"),
    ('{"classes": ["Bag", "Shoe"]}', "classes: ['Bag', 'Shoe'] should be a list of classes, by name or number; "),
    ('{"seed": 1.5}', "seed: 1.5 should be "),
    ("{oops", "not JSON ("),
    ("", 'the body should be JSON such as {"classes": ["Bag"]}, sent as '),
    ("[1]", 'the body should be JSON such as {"classes": ["Bag"]}, sent as '),
]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["Bag"], ["Bag"]),
        (["bag", " ANKLE BOOT ", "t-shirt/top"], ["Bag", "Ankle boot", "T-shirt/top"]),
        ([7, "0", "Shirt"], ["Sneaker", "T-shirt/top", "Shirt"]),
    ],
)
def test_classes_by_name_or_number(given, names):
    assert [CLASSES[n] for n in class_numbers(Request(classes=given).classes, CLASSES)] == names


@pytest.mark.parametrize("given", [["Bagg"], ["Bag", "10"], ["-1"], [""]])
def test_other_classes_are_refused(given):
    with pytest.raises(UserError) as caught:
        class_numbers(given, CLASSES)
    assert str(caught.value).startswith(f"classes: {given!r} should be a list of classes")


@pytest.fixture(scope="module")
def server(random_model):
    """The address of a real server of a model that has learned nothing."""
    with served(ROOT, str(random_model)) as address:
        yield address


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image).astype(int)


def drawn_by_the_stage(model: Path, folder: Path, count: int, **changes) -> np.ndarray:
    p = SAMPLING.model_copy(update=changes)
    folder.mkdir()
    drawn = draw_images(Pipeline(model, torch.device("cpu")), p.model_copy(update={"count": count}), folder)
    return drawn.images.numpy().astype(int)


def test_the_same_seed_gives_the_same_pictures_as_the_stage(server, random_model, tmp_path):
    """But for rounding: the stage draws more at once."""
    body = {"classes": ["Bag", 7], "count": 130, "seed": 5, "steps": 4, "guidance_scale": 2}
    answer = requests.post(f"{server}/images", json=body, timeout=60)
    assert answer.status_code == 200
    images = answer.json()["images"]
    assert [i["class"] for i in images] == ["Bag", "Sneaker"] * 65
    served = np.stack([pixels(base64.b64decode(i["png"])) for i in images])
    expected = drawn_by_the_stage(random_model, tmp_path / "a", 130, classes=[8, 7], seed=5, steps=4, guidance_scale=2.0)
    assert abs(served - expected).max() <= 1
    other = drawn_by_the_stage(random_model, tmp_path / "b", 130, classes=[8, 7], seed=6, steps=4, guidance_scale=2.0)
    assert abs(served - other).mean() > 5

    fewer = requests.post(f"{server}/images", json={**body, "count": 3}, timeout=60).json()["images"]
    assert abs(np.stack([pixels(base64.b64decode(i["png"])) for i in fewer]) - expected[:3]).max() <= 1


def test_what_is_left_out_is_as_in_the_parameters(server, random_model, tmp_path):
    images = requests.post(f"{server}/images", json={}, timeout=60).json()["images"]
    assert [i["class"] for i in images] == list(CLASSES)
    served = np.stack([pixels(base64.b64decode(i["png"])) for i in images])
    assert abs(served - drawn_by_the_stage(random_model, tmp_path / "a", 10, seed=0)).max() <= 1
    about = requests.get(f"{server}/about", timeout=10).json()
    assert about["model"] == str(random_model)
    assert SampleParams.model_validate(about["sampling"]) == SAMPLING


def test_the_sheet_is_a_picture_with_all_of_them(server):
    answer = requests.get(f"{server}/sheet?classes=Dress&classes=3&count=23&seed=2", timeout=60)
    assert answer.headers["content-type"] == "image/png"
    picture = pixels(answer.content)
    images = requests.post(f"{server}/images", json={"classes": ["Dress"], "count": 23, "seed": 2}, timeout=60).json()["images"]
    for i, image in enumerate(images):
        top, left = (2 + i // 10 * 58), (2 + i % 10 * 58)
        assert (picture[top : top + 56 : 2, left : left + 56 : 2] == pixels(base64.b64decode(image["png"]))).all()


@pytest.mark.parametrize(("query", "message"), BAD)
def test_a_bad_query_is_told_in_one_line(server, query, message):
    answer = requests.get(f"{server}/sheet?{query}", timeout=30)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(message)


@pytest.mark.parametrize(("body", "message"), BAD_JSON)
def test_a_bad_body_is_told_in_one_line(server, body, message):
    answer = requests.post(f"{server}/images", data=body, headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(message)


def test_curls_own_content_type_is_told(server):
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = requests.post(f"{server}/images", data='{"count": 1}', headers=headers, timeout=30)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("the body should be JSON such as ")
    assert requests.get(f"{server}/nothing", timeout=30).json() == {"error": "Not Found"}


@pytest.mark.parametrize(("label_dropout", "names"), [(1.0, ["none"] * 4), (0.0, list(CLASSES[:4]))])
def test_a_model_that_always_or_never_saw_classes_is_asked_for_what_it_knows(random_model, label_dropout, names):
    pipeline = Pipeline(random_model, torch.device("cpu"))
    pipeline.label_dropout = label_dropout
    images, drawn = respond(pipeline, SAMPLING, Request(count=4, steps=2))
    assert drawn == names
    assert len(images) == 4
    with pytest.raises(UserError):
        respond(pipeline, SAMPLING, Request(classes=["Bag"], guidance_scale=2.0, steps=2))


def test_eight_clients_at_once_get_what_each_would_get_alone(server):
    def ask(seed: int) -> str:
        answer = requests.post(f"{server}/images", json={"count": 5 + seed, "seed": seed}, timeout=120)
        assert answer.status_code == 200
        return json.dumps(answer.json())

    alone = [ask(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, list(range(8)) * 3)) == alone * 3
    assert len(set(alone)) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pth"], f"error: nowhere.pth: there is no such file; {REMEDY}\n"),
        (["params.yaml"], f"error: params.yaml: corrupt, or not a plain weights file; {REMEDY}\n"),
    ],
)
def test_it_does_not_start_without_a_model(arguments, message):
    command = ["python", "src/serve.py", *arguments, "--port", str(free_port())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, message)


def test_a_taken_port_is_told(server, random_model):
    port = int(server.rpartition(":")[2])
    done = subprocess.run(
        ["python", "src/serve.py", str(random_model), "--port", str(port)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == f"error: port {port} is taken; choose another: python src/serve.py --port {port + 1}\n"
