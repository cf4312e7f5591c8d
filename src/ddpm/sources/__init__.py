"""Sources: where data sets come from, and how they get into data/<name>/raw in MNIST's format, where ddpm.data reads them.

download.py gets Fashion-MNIST from a folder, a mirror or a Debian package; named.py gets MNIST and CIFAR-10 by torchvision.
user_folder.py takes a user's folder: MNIST's four files (mnist_files.py) or images (image_folder.py); layout.py finds out
which classes these have, and which are held out for testing. raw_files.py writes what all of them take.
"""
