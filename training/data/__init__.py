"""Data sets, their archives, loading and augmentation."""
