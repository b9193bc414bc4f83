"""The standard set of the helpers against AutoAttack: accuracy left and seconds, on the same networks and images.

Three networks of one shape (chapter 02's): trained normally, on mixed batches and with PGD, each under linf and l2.
AutoAttack (Croce & Hein 2020; APGD-CE, APGD-T, FAB-T, Square with 5,000 queries) runs in PyTorch on
the same weights; the logits of both are compared first, and both kinds of images judged by the Keras network. `union`
is what neither leaves standing. Each network and threat is a unit: a bench that was stopped goes on. Seconds of
the processor are compared, since neighbours lengthen those of the clock.

PyTorch has builds of its own for every platform and is not in requirements.in: install it first, for a processor,
where PYTHONPATH finds it. Usage: python tests/benchmarks/bench_strength.py [--help].
"""

import helpers  # noqa: F401, I001 - first: it turns oneDNN on, which has to happen before TensorFlow loads

# isort: split
import logging
import time

import keras
import numpy as np
import pandas as pd
import pyautoattack
import torch
from common import parser, report, verdicts
from torch import nn

from helpers import data, evaluation, models, standard, training, units
from helpers.threat import ThreatModel
from helpers.training import Adversary

PEERS = ("pyautoattack", "torch")
NETWORKS = {
    "normal": None,
    "mixed-batch": Adversary(0.3),
    "PGD-trained": Adversary(0.3, steps=7, random_start=True, mixed=False),
}
THREATS = {  # network: what is attacked; the first two where AutoAttack leaves something to find
    "normal": [("linf", 0.05), ("l2", 0.75)],
    "mixed-batch": [("linf", 0.1), ("l2", 1.5)],
    "PGD-trained": [("linf", 0.3), ("l2", 1.5)],
}
TARGETS = {"accuracy above AutoAttack's": ("<=", 0.01), "AutoAttack's seconds / ours": (">=", 3.0)}


def arguments():
    options = parser(__doc__)
    options.set_defaults(data="mnist", images=500, epochs=5)
    options.add_argument("--train", type=int, default=20000, help="training images")
    options.add_argument("--only", nargs="+", default=list(NETWORKS), choices=NETWORKS, help="networks")
    options.add_argument("--without-peer", action="store_true", help="do not run AutoAttack")
    return options.parse_args()


def trained(name, dataset, options):
    """Path of the network in the output folder, where it may have been trained before."""
    path = options.output / "bench-networks" / f"{options.data}-{options.train}-{options.epochs}-{name}.keras"
    if not path.exists():
        model = models.two_conv(dataset.x_train.shape[1:], len(dataset.class_names))
        x, y = dataset.x_train[: options.train], dataset.y_train[: options.train]
        training.fit(model, x, y, epochs=options.epochs, batch_size=128, adversary=NETWORKS[name], label=name)
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(path)
    return path


class Flat(nn.Module):
    """Flatten as Keras does, channels last."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)


class Same(nn.Module):
    """Padding "same" of a 3x3 convolution: at stride 2 Keras pads behind alone."""

    def __init__(self, stride):
        super().__init__()
        self.sides = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)

    def forward(self, x):
        return nn.functional.pad(x, self.sides)


def as_torch(model):
    """The Keras network in PyTorch, from images (n, c, h, w) to logits."""
    parts = []
    for layer in model.layers:
        weights = [torch.tensor(w) for w in layer.get_weights()]
        if isinstance(layer, keras.layers.Conv2D):
            part = nn.Conv2d(weights[0].shape[2], weights[0].shape[3], 3, layer.strides[0])
            part.weight.data, part.bias.data = weights[0].permute(3, 2, 0, 1).contiguous(), weights[1]
            parts += [Same(layer.strides[0]), part, nn.ReLU()]
        elif isinstance(layer, keras.layers.BatchNormalization):
            part = (nn.BatchNorm1d if len(layer.input.shape) == 2 else nn.BatchNorm2d)(len(weights[0]), layer.epsilon)
            part.weight.data, part.bias.data, part.running_mean, part.running_var = weights
            parts.append(part)
        elif isinstance(layer, keras.layers.Dense):
            part = nn.Linear(*weights[0].shape)
            part.weight.data, part.bias.data = weights[0].T.contiguous(), weights[1]
            parts += [part, nn.ReLU()] if layer.activation is keras.activations.relu else [part]
        elif isinstance(layer, keras.layers.Flatten):
            parts.append(Flat())
        elif not isinstance(layer, keras.layers.Dropout):
            raise TypeError(f"no counterpart in PyTorch for {type(layer).__name__}")
    return nn.Sequential(*parts).eval()


def peer(network, x, y, norm, eps):
    """AutoAttack's images (n, h, w, c)."""
    attack = pyautoattack.AutoAttack(network, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0)
    images, labels = torch.tensor(x.transpose(0, 3, 1, 2)).contiguous(), torch.tensor(y)
    found = attack.run_standard_evaluation(images, labels, batch_size=len(x))
    return (found[0] if isinstance(found, tuple) else found).numpy().transpose(0, 2, 3, 1)


def seconds(function, *arguments, **options):
    """What a call returns, and its seconds by the clock and of the processor, which neighbours do not change."""
    clock, processor = time.perf_counter(), time.process_time()
    found = function(*arguments, **options)
    return found, time.perf_counter() - clock, time.process_time() - processor


def compare(path, dataset, images, norm, eps, with_peer):
    """A unit: what each leaves, both together, and their seconds; and the cascade's table."""
    model, whole = keras.saving.load_model(path, compile=False, safe_mode=True), data.load(dataset)
    some = np.random.default_rng(0).permutation(len(whole.x_test))[:images]
    x, y, threat = whole.x_test[some], whole.y_test[some], ThreatModel(norm, eps)
    row = {"clean": float(evaluation.correct(model, x, y).mean())}
    for attack in standard.STANDARD.values():  # compile before the clock runs
        attack(model, x[:2], y[:2], threat)
    (found, table), row["ours, s"], row["ours, processor s"] = seconds(
        standard.standard, model, x, y, threat, batch_size=len(x))
    row["ours"] = float(np.mean(found.value <= 0))
    assert threat.contains(found.images, x).all()
    assert np.array_equal(evaluation.correct(model, found.images, y), found.value <= 0)
    if with_peer:
        network = as_torch(model)
        with torch.no_grad():
            theirs = network(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
        np.testing.assert_allclose(theirs, evaluation.logits(model, x), rtol=1e-4, atol=1e-4)
        their_images, row["AutoAttack, s"], row["AutoAttack, processor s"] = seconds(peer, network, x, y, norm, eps)
        standing = evaluation.correct(model, np.ascontiguousarray(their_images), y)
        row |= {"AutoAttack": float(standing.mean()), "union": float((standing & (found.value <= 0)).mean())}
    return {"row": row, "table": table.to_dict("list")}


def ratios(rows):
    """What `TARGETS` are about, of every row: "row: target"."""
    return {f"{name}: {target}": value for name, row in rows.items() for target, value in (
        ("accuracy above AutoAttack's", row["ours"] - row["AutoAttack"]),
        ("AutoAttack's seconds / ours", row["AutoAttack, processor s"] / row["ours, processor s"]))}


def main():
    options = arguments()
    logging.disable(logging.INFO)
    dataset = data.load(options.data)
    asked = {f"{name}, {norm} {eps}": dict(
        path=str(trained(name, dataset, options)), dataset=options.data, images=options.images, norm=norm, eps=eps,
        with_peer=not options.without_peer) for name in options.only for norm, eps in THREATS[name]}
    found = units.run(compare, asked, folder=options.output / "bench-strength", n_jobs=1, data=dataset.sha256)
    rows = {name: one["row"] for name, one in found.items()}
    cascades = [pd.DataFrame(one["table"]).assign(network=name) for name, one in found.items()]
    tables = {"strength": pd.DataFrame.from_dict(rows, orient="index"),
              "cascade": pd.concat(cascades).reset_index(drop=True)}
    if not options.without_peer:
        measured = ratios(rows)
        tables["targets"] = verdicts(measured, {key: TARGETS[key.partition(": ")[2]] for key in measured})
    report("strength", options, dataset, tables, peers=units.versions(*PEERS))


if __name__ == "__main__":
    main()
