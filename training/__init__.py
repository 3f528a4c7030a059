"""What ``train_minimal.py`` calls: data, augmentation, the step, metrics, checkpoints, records."""
