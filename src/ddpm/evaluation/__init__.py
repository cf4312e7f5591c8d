"""Evaluation: how good samples are, beside what real images score.

Read judge.py first: it computes every figure of output/metrics/evaluate.json. evaluator.py finds the network whose features the
metrics compare, or has it trained: classifier.py is the network, classifier_training.py trains it, features.py extracts its
features, and metrics.py has the metrics. two_sample.py trains networks to tell samples from real images.
"""
