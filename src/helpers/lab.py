"""The networks of the lab, a page that attacks digits in the browser: trained, measured, written as a script.

The page opens from a folder without a server, where it may load scripts and no other files: `weights.js` holds the
numbers as float16 in base64, a hundred test digits as bytes, and the record, which also stands alone in `record.json`.
"""

import base64
import json
import zlib
from pathlib import Path

import keras
import numpy as np
from keras import layers

from helpers import attacks, data, evaluation, files, filters, training, units
from helpers.records import Record
from helpers.threat import ThreatModel

SIZE = [8, 24, 40]  # filters of two convolutions (3x3, stride 2), and a dense layer
EPS, STEPS, SIGMA = 0.3, 20, 1.0  # radius of training and measuring (linf), steps of PGD, pixels of the blur
_PGD = {"steps": 7, "random_start": True, "mixed": False}
STAGES = {  # of training: epochs and the attacker inside. So small a network learns nothing from PGD at 0.3 at once.
    "normal": [[4, None]],
    "mixed-batch": [[6, {"eps": EPS}]],
    "PGD-trained": [[1, _PGD | {"eps": 0.1}], [1, _PGD | {"eps": 0.2}], [6, _PGD | {"eps": EPS}]],
}
_START = "// Made by `python -m helpers lab`; what it says of itself is in record.json.\nwindow.labData = "
_END = ";  // codespell:ignore\n"  # base64 holds all sorts of words


def network(seed=0):
    """A keras.Sequential from digits (n, 28, 28, 1) in [0, 1] to logits (n, 10), without weights of value yet."""
    keras.utils.set_random_seed(seed)
    convolutions = [layers.Conv2D(n, 3, 2, padding="same", activation="relu") for n in SIZE[:2]]
    return keras.Sequential([layers.Input((28, 28, 1)), *convolutions, layers.Flatten(),
                             layers.Dense(SIZE[2], activation="relu"), layers.Dense(10)])


def shown(dataset):
    """Rows of the test digits that the page shows: the first ten of each class, class by class."""
    rows = [np.flatnonzero(dataset.y_test == k)[:10] for k in range(10)]
    if dataset.x_test.shape[1:] != (28, 28, 1) or min(map(len, rows)) < 10:
        raise ValueError(f"data: {dataset.name} has images {dataset.x_test.shape[1:]} in {len(dataset.class_names)} "
                         "classes; expected (28, 28, 1), and ten test images of each of ten classes")
    return np.concatenate(rows)


def train(name, dataset, images, epochs):
    """Train the network `name` of `STAGES`, round it to float16, and measure that: a unit.

    images, epochs : of training, and of a stage at most; None takes all.
    """
    whole, model = data.load(dataset), network()
    rows, part = shown(whole), whole.take(images)
    for number, (longest, adversary) in enumerate(STAGES[name]):
        training.fit(model, part.x_train, part.y_train, epochs=min(longest, epochs or longest), batch_size=128,
                     adversary=adversary and training.Adversary(**adversary), learning_rate=2e-3, seed=number)
    numbers = np.concatenate([weights.ravel() for weights in model.get_weights()]).astype(np.float16)
    fill(model, numbers)
    x, y, threat = whole.x_test[rows], whole.y_test[rows], ThreatModel("linf", EPS)
    blurred = filters.defend(model, "gaussian", SIGMA)
    beaten = {"fgsm": attacks.fgsm(model, x, y, threat), "pgd": attacks.pgd(model, x, y, threat, steps=STEPS, start=x)}
    return {"numbers": numbers, "clean": evaluation.score(model, whole.x_test, whole.y_test)["accuracy"],
            "blurred": evaluation.score(blurred, whole.x_test, whole.y_test)["accuracy"],
            **{attack: float((found.value <= 0).mean()) for attack, found in beaten.items()}}


def fill(model, numbers):
    """Give `model` the weights in `numbers`, one after the other in Keras' order."""
    ends = np.cumsum([weights.size for weights in model.get_weights()])
    parts = np.split(np.asarray(numbers, np.float32), ends[:-1])
    model.set_weights([part.reshape(old.shape) for part, old in zip(parts, model.get_weights(), strict=True)])


def make(folder, dataset="mnist", images=None, epochs=None):
    """Train what is not trained yet, and write `weights.js` and `record.json` to `folder`; return their paths."""
    whole = data.load(dataset)
    rows = shown(whole)
    record = Record.start("00_lab", "paper", {dataset: whole.take(images).provenance()})  # for what it says of itself
    grid = {name: {"name": name, "dataset": dataset, "images": images, "epochs": epochs} for name in STAGES}
    found = units.run(train, grid, folder=files.output("units", "lab"), data=whole.sha256)
    record.provenance.seconds = round(sum(unit["seconds"] for unit in found.values()), 1)
    numbers = {name: _packed(unit.pop("numbers")) for name, unit in found.items()}
    about = {"created": record.created, "provenance": record.provenance.model_dump(), "data": dataset,
             "size": SIZE, "eps": EPS, "steps": STEPS, "sigma": SIGMA, "digits": len(rows), "tested": len(whole.y_test),
             "bytes": sum(packed["bytes"] for packed in numbers.values()),
             "networks": {name: unit | {"stages": STAGES[name], "longest": epochs} for name, unit in found.items()}}
    pixels = np.rint(255 * whole.x_test[rows]).astype(np.uint8)
    content = {"networks": numbers, "pixels": _packed(pixels), "labels": whole.y_test[rows].tolist(), "record": about}
    texts = {"weights.js": _START + json.dumps(content) + _END, "record.json": json.dumps(about, indent=1) + "\n"}
    for name, text in texts.items():
        with files.atomic(Path(folder, name)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [Path(folder, name) for name in texts]


def _packed(array):
    raw = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return {"base64": base64.b64encode(raw).decode(), "bytes": len(raw), "adler32": zlib.adler32(raw)}


def read(path):
    """What `weights.js` holds: networks by name, the digits (n, 28, 28, 1) in [0, 1], their labels (n,), the record."""
    content = json.loads(Path(path).read_text(encoding="utf-8").removeprefix(_START).removesuffix(_END))
    models = {}
    for name, packed in content["networks"].items():
        fill(models.setdefault(name, network()), np.frombuffer(base64.b64decode(packed["base64"]), "<f2"))
    pixels = np.frombuffer(base64.b64decode(content["pixels"]["base64"]), np.uint8).reshape(-1, 28, 28, 1)
    return models, pixels.astype(np.float32) / 255, np.array(content["labels"]), content["record"]
