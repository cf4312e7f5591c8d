"""Diffusion: the mathematics, which needs nothing but PyTorch and knows no files, parameters or data sets.

Read schedule.py first (how much noise at each timestep), then process.py (adding noise, what the network predicts, the loss),
unet.py (the network), rng.py (which noise) and samplers.py (from noise to images).
"""
