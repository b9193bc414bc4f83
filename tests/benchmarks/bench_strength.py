"""The standard set of the helpers against AutoAttack: accuracy left and seconds, on the same networks and images.

Three networks of one shape (chapter 02's): trained normally, on mixed batches and with PGD, each under linf and l2.
AutoAttack (Croce & Hein 2020; APGD-CE, APGD-T, FAB-T, Square with 5,000 queries) runs in PyTorch on
the same weights; the logits of both are compared first, and both kinds of images judged by the Keras network. `union`
is what neither leaves standing.

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
    """The network, from the output folder where it has been trained before."""
    path = options.output / "bench-networks" / f"{options.data}-{options.train}-{options.epochs}-{name}.keras"
    if not path.exists():
        model = models.two_conv(dataset.x_train.shape[1:], len(dataset.class_names))
        x, y = dataset.x_train[: options.train], dataset.y_train[: options.train]
        training.fit(model, x, y, epochs=options.epochs, batch_size=128, adversary=NETWORKS[name], label=name)
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(path)
    return keras.saving.load_model(path, compile=False, safe_mode=True)


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


def compare(model, x, y, norm, eps, options):
    """A row: what each leaves, both together, and their seconds; and the cascade's table."""
    threat, row = ThreatModel(norm, eps), {"clean": float(evaluation.correct(model, x, y).mean())}
    for attack in standard.STANDARD.values():  # compile before the clock runs
        attack(model, x[:2], y[:2], threat)
    start = time.perf_counter()
    found, table = standard.standard(model, x, y, threat, batch_size=len(x))
    row |= {"ours, s": time.perf_counter() - start, "ours": float(np.mean(found.value <= 0))}
    assert threat.contains(found.images, x).all()
    assert np.array_equal(evaluation.correct(model, found.images, y), found.value <= 0)
    if options.without_peer:
        return row, table
    network = as_torch(model)
    with torch.no_grad():
        theirs = network(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(theirs, evaluation.logits(model, x), rtol=1e-4, atol=1e-4)
    start = time.perf_counter()
    images = peer(network, x, y, norm, eps)
    row["AutoAttack, s"] = time.perf_counter() - start
    standing = evaluation.correct(model, np.ascontiguousarray(images), y)
    row |= {"AutoAttack": float(standing.mean()), "union": float((standing & (found.value <= 0)).mean())}
    return row, table


def ratios(rows):
    """What `TARGETS` are about, of every row."""
    return {(name, target): value for name, row in rows.items() for target, value in (
        ("accuracy above AutoAttack's", row["ours"] - row["AutoAttack"]),
        ("AutoAttack's seconds / ours", row["AutoAttack, s"] / row["ours, s"]))}


def main():
    options = arguments()
    logging.disable(logging.INFO)
    dataset = data.load(options.data)
    some = np.random.default_rng(0).permutation(len(dataset.x_test))[: options.images]
    x, y, rows, cascades = dataset.x_test[some], dataset.y_test[some], {}, []
    for name in options.only:
        model = trained(name, dataset, options)
        for norm, eps in THREATS[name]:
            key = f"{name}, {norm} {eps}"
            rows[key], table = compare(model, x, y, norm, eps, options)
            cascades.append(table.assign(network=key))
            print(pd.DataFrame({key: rows[key]}).T.to_string(), table.to_string(), sep="\n", flush=True)
    tables = {"strength": pd.DataFrame.from_dict(rows, orient="index"),
              "cascade": pd.concat(cascades).reset_index(drop=True)}
    if not options.without_peer:
        targets = {key: TARGETS[key[1]] for key in ratios(rows)}
        tables["targets"] = verdicts(ratios(rows), targets).rename(index=": ".join)
    report("strength", options, dataset, tables, peers=units.versions(*PEERS))


if __name__ == "__main__":
    main()
