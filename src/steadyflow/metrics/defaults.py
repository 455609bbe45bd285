"""Which features a data set is scored with unless another choice is made."""

from steadyflow.metrics.digits_net import DigitsNet
from steadyflow.metrics.extractor import FeatureExtractor
from steadyflow.metrics.inception import Inception


def default_features(dataset: str) -> FeatureExtractor:
    """DigitsNet for steadyflow.data.Digits, Inception for any other data set, by the name of its class."""
    return DigitsNet() if dataset == "steadyflow.data.Digits" else Inception()
