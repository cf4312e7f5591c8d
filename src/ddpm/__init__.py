"""The library that the pipeline's stages call: a diffusion model for Fashion-MNIST, its training, sampling and evaluation."""
