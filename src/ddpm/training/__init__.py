"""Training: from a data set and the `train` section of params.yaml to the weights of a diffusion model.

Read loop.py first: it is the whole training on one screen. Then, in the order in which the loop meets them: state.py (what is
saved and resumed), batches.py (what each step draws), step.py (one optimiser step), window.py (losses, ten steps at a time),
validation.py (validation loss and sample previews). optim.py makes the optimisers, of which muon.py is one, and memory.py
estimates how much memory a training takes.
"""
