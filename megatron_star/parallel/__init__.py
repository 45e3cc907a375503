"""Process groups, and every torch.distributed call of the model path."""
