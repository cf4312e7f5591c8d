"""Sampling: from a trained model and the `sample` section of params.yaml to images and pictures.

Read pipeline.py first (one batch, from noise to images), then batches.py (any number of images, resumable, on several processes)
and pictures.py (grid, strip and animation). The samplers themselves are mathematics: ddpm.diffusion.samplers.
"""
