"""Serving: images on request, from a trained model. No stage of the pipeline depends on it.

Read requests.py first: what a client may ask for, and the answer. `src/serve.py` serves that over HTTP, and the model in MLflow's
registry (ddpm.tracking.served_model) answers the same requests. pretrained.py is about the model that comes with the repository.
"""
