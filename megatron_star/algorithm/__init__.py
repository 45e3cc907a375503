"""Star Attention, as in the paper: context encoding and token generation."""
