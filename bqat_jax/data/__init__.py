"""Data: sources of TensorFlow Datasets, the order of reading, preprocessing and augmentation."""
