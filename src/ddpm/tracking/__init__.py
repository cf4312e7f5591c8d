"""Tracking: what every stage logs to MLflow, and what other commands read from there. It changes no result.

Read run.py first: the run of a stage, its journal on disk, and the thread that sends the journal. Then journal.py (what is on
disk), store.py (connecting, sending in order, giving up) and stored_run.py (what MLflow gets for each entry of the journal).
provenance.py gives a run its name, tags and description. registry.py makes evaluated models versions, one of them the champion;
ranking.py says which evaluation is better; served_model.py is what MLflow runs to serve a version. queries.py looks things up.
connection.py has what most of these use: addresses, defaults of the environment, and errors in one line.
"""
