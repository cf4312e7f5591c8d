"""Data: the data set that the stages read, and the samples that `sample` hands to `evaluate`.

Read dataset.py first: it loads the data set of data/<name>/raw. fashion_mnist.py verifies Fashion-MNIST's files, idx.py has their
format, pixels.py converts pixels to the network's range and back, and samples_file.py is output/samples.npz.
Where data sets come from is ddpm.sources.
"""
