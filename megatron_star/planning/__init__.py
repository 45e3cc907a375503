"""Who sees what, who encodes it, and what that costs: integers and arithmetic, no torch."""
