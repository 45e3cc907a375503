"""The candidates that are compared where no others are asked for."""

DEFAULT = (
    "exact",
    *(f"star blocks={blocks}{repair}" for blocks in (8, 16) for repair in ("", " neighbors=1")),
    *(
        f"star blocks=16 {repair}"
        for repair in (
            "exact_layers=hidden:6",
            "exact_layers=13+15+17+19+21+23",
            "last_block=exact",
            "spacing=log",
            "delta=16",
            "delta=64",
            "asked_blocks=4",
            "asked_bias=-1",
            "passed=16 select=scores",
            "passed=32 select=scores",
            "anchor=64 passed=32 select=scores",
            "anchor=64 passed=32 select=scores rows=128",
            "anchor=64 passed=32 select=scores pooling=1",
            "anchor=64 passed=32 select=last",
            "anchor=64 passed=16",
            "anchor=64 passed=32",
            "anchor=64 passed=32 most=192",
            "anchor=64 passed=32 halving=2",
            "anchor=64 passed=32 halving=2 pooling=5",
            "anchor=16 passed=32 halving=2",
            "anchor=64 passed=32 halving=1",
            "anchor=64 passed=64 halving=1",
            "anchor=128 passed=48 halving=1",
            "anchor=64 passed=64 halving=1 halving_each=block",
            "anchor=64 passed=96 halving=1 halving_each=block",
            "anchor=64 passed=64 halving=1 neighbors=1",
        )
    ),
    *(
        f"star blocks=8 anchor={anchor} passed={repair}"
        for anchor, repair in (
            (64, "32 select=scores"),
            (64, "64 select=scores"),
            (64, "112 select=scores"),
            (4, "112 select=scores"),
            (256, "64 select=scores"),
            (64, "64 select=norm"),
            (64, "64 select=last"),
            (64, "64 select=stride"),
            (64, "32"),
            (64, "64"),
            (16, "64"),
            (64, "96"),
            (64, "64 halving=1"),
            (64, "96 halving=1"),
            (64, "128 halving=1"),
            (64, "128 halving=1 halving_each=block"),
        )
    ),
)
"""Every family, at the sizes that were tried first. `repair_candidates.py` says what the words mean."""
