"""Post-training quantization: one artifact for each target runtime."""
