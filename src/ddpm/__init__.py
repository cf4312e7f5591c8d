"""The library that the scripts in src/ call: a diffusion model of images, its training, sampling and evaluation.

Each folder has its own docstring, which says what to read first. Imports go in one direction, from left to right:

    scripts → stage, experiments, tracking → sources | training | sampling | evaluation → data → diffusion | runtime
            → files, params → errors, paths

sources, training, sampling and evaluation, one for each stage of the pipeline, don't import one another. checkpoint (the trained
model as a file) lies between them and data. serving answers requests for images, and only scripts and tracking import it.
"""
