"""What the Triton backends share."""
