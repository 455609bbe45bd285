"""Scores of images: feature extractors, metrics, what they compare with, and the one pass that computes them all."""

from steadyflow.metrics.consistency import Consistency
from steadyflow.metrics.defaults import default_features
from steadyflow.metrics.digits_net import DigitsNet
from steadyflow.metrics.evaluator import Evaluator
from steadyflow.metrics.extractor import FeatureExtractor
from steadyflow.metrics.frechet import FrechetDistance, frechet_distance
from steadyflow.metrics.inception import Inception
from steadyflow.metrics.inception_score import ClassAccuracy, InceptionScore
from steadyflow.metrics.kernel import KernelDistance
from steadyflow.metrics.memorisation import Memorisation
from steadyflow.metrics.metric import EvaluationMetric, PerImageMetric
from steadyflow.metrics.paired import PSNR, RMSE, SSIM
from steadyflow.metrics.perceptual import LPIPS, DigitsDistance
from steadyflow.metrics.precision_recall import PrecisionRecall
from steadyflow.metrics.reference import Reference, Sources
from steadyflow.metrics.resnet_cifar10 import ResNetCIFAR10

__all__ = [
    "LPIPS",
    "PSNR",
    "RMSE",
    "SSIM",
    "ClassAccuracy",
    "Consistency",
    "DigitsDistance",
    "DigitsNet",
    "EvaluationMetric",
    "Evaluator",
    "FeatureExtractor",
    "FrechetDistance",
    "Inception",
    "InceptionScore",
    "KernelDistance",
    "Memorisation",
    "PerImageMetric",
    "PrecisionRecall",
    "Reference",
    "ResNetCIFAR10",
    "Sources",
    "default_features",
    "frechet_distance",
]
