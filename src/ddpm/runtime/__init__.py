"""Runtime: how work runs, whatever it computes. Changes here change no result, and nothing here knows of diffusion.

Read cli.py (errors in one line, signals), device.py (CPU or GPU), distributed.py (several processes) and run_folder.py (what an
interrupted run leaves to resume from). Each can be read by itself.
"""
