"""Images: TensorFlow Datasets sources, the order they are read in, augmentation."""
