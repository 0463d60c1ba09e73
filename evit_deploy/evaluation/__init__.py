"""Accuracy on labelled images, of the reference and of every backend, on the same decoded pixels."""

from evit_deploy.evaluation.report import EvaluationReport
from evit_deploy.evaluation.run import run_evaluation

__all__ = ["EvaluationReport", "run_evaluation"]
