"""The all-gather of one tensor under the name that this torch gives it (renamed after 2.13)."""

import torch.distributed as dist

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
