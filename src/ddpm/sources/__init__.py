"""Sources: where data sets come from, and how they get into data/<name>/raw in MNIST's format, where ddpm.data reads them.

download.py gets Fashion-MNIST from a folder, a mirror or a Debian package. user_folder.py takes a data set from a user's folder:
read it before mnist_files.py (MNIST's own files) and image_folder.py (images), between which it chooses.
"""
