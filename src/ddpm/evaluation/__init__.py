"""Evaluation: how good samples are, beside what real images score.

Read judge.py first: it computes every figure of output/metrics/evaluate.json. classifier.py is the frozen network whose features
the metrics compare, features.py extracts them, metrics.py has the metrics. classifier_training.py made the classifier.
"""
