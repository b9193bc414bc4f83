"""Does a data set give its labels away? Rules that no eye needs, images in both parts, groups in both parts."""

from dataclasses import replace

import numpy as np
from sklearn.tree import DecisionTreeClassifier

from helpers.evaluation import seen

_DEPTH = 3  # of the trees: a few thresholds


def rules(dataset, looks=None):
    """Test accuracy of a small decision tree that sees one thing of each image: rule -> accuracy.

    looks : function of images (n, h, w, c) in [0, 1], what is seen of them: rule -> values (n, ...). Without it:
    corners, border : those pixels. minimum, maximum, median, mode : of all pixels of the image, in grey levels. A class
    that can be told by one of them is told by how its images were made, and no attack within a few levels changes that.
    """
    train, test = ((looks or _looks)(x) for x in (dataset.x_train, dataset.x_test))
    trees = {name: DecisionTreeClassifier(max_depth=_DEPTH, random_state=0) for name in train}
    train, test = ({name: np.reshape(seen, (len(seen), -1)) for name, seen in part.items()} for part in (train, test))
    return {name: float(tree.fit(train[name], dataset.y_train).score(test[name], dataset.y_test))
            for name, tree in trees.items()}


def _looks(x):
    levels = np.rint(255 * x.mean(axis=-1)).astype(int)
    flat = levels.reshape(len(x), -1)
    edges = [levels[:, 0], levels[:, -1], levels[:, :, 0], levels[:, :, -1]]
    modes = np.array([np.bincount(image, minlength=256).argmax() for image in flat])
    return {"corners": levels[:, [0, 0, -1, -1], [0, -1, 0, -1]], "border": np.concatenate(edges, axis=1),
            "minimum": flat.min(axis=1), "maximum": flat.max(axis=1), "median": np.median(flat, axis=1), "mode": modes}


def repeated(dataset, side=8, levels=16):
    """Which test images are, as thumbnails of `side` x `side` pixels in a few grey `levels`, in training, (n,) bool."""
    return seen(*(_thumbnails(x, side, levels) for x in (dataset.x_test, dataset.x_train)))


def _thumbnails(x, side, levels):
    grey = x.mean(axis=-1)
    cuts = [np.array_split(np.arange(length), side) for length in grey.shape[1:]]
    small = np.stack([np.stack([grey[:, rows][:, :, columns].mean(axis=(1, 2)) for columns in cuts[1]], axis=1)
                      for rows in cuts[0]], axis=1)
    return np.rint((levels - 1) * small).astype(np.uint8)


def split_groups(dataset, key="group"):
    """Groups (tiles, patients) that have images in both parts; None where the set names no groups."""
    if f"{key}_train" not in dataset.extra:
        return None
    return sorted(set(dataset.extra[f"{key}_train"].tolist()) & set(dataset.extra[f"{key}_test"].tolist()))


def planted(dataset, first=0.2, step=0.2):
    """A copy of `dataset` whose labels are given away by one pixel: the corner is `first` + `step` times the label."""
    def marked(x, y):
        x = x.copy()
        x[:, 0, 0] = (first + step * y)[:, None]
        return x

    if first < 0 or first + step * (len(dataset.class_names) - 1) > 1:
        raise ValueError(f"first is {first} and step {step}; expected greys in [0, 1] for {len(dataset.class_names)} "
                         "classes")
    return replace(dataset, x_train=marked(dataset.x_train, dataset.y_train),
                   x_test=marked(dataset.x_test, dataset.y_test))
