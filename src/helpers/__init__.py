"""Small shared package of the book: data, networks, attacks, training, evaluation, figures and records."""

import os

# oneDNN is off by default on some processors and doubles the speed there; both must be set before TensorFlow loads.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

__version__ = "0.1.0"
