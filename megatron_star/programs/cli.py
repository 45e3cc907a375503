"""The command `megatron-star`: every program of this project by name, for people who do not want paths.

megatron-star convert --hf DIR --output DIR
torchrun --no-python --nproc-per-node 2 megatron-star generate --load DIR --context-parallel-size 2 ...
"""

import runpy
import sys

ON_RANKS = "(on the ranks of torchrun or srun)"
PROGRAMS = {
    "generate": ("megatron_star.programs.generate", f"ask questions about documents {ON_RANKS}"),
    "serve": ("megatron_star.programs.serve", f"serve over HTTP {ON_RANKS}"),
    "convert": ("checkpoints_tools.convert_hf_to_megatron", "a Hugging Face checkpoint to Megatron"),
    "verify": ("checkpoints_tools.verify", "compare a Megatron checkpoint with its source"),
    "eval": ("megatron_star.programs.evaluate", f"score settings on RULER's tasks {ON_RANKS}"),
    "report": ("megatron_star.programs.report", "tables and pictures of what eval has measured"),
    "calibrate": ("megatron_star.programs.calibrate", f"the cheapest setting for your own data {ON_RANKS}"),
    "contexts": (
        "megatron_star.programs.contexts",
        f"list, drop or encode contexts of a store (encode {ON_RANKS[1:]}",
    ),
    "plan": ("megatron_star.programs.plan_cluster", "which GPUs a model and a context need, and how fast"),
}
USAGE_STATUS = 2


def usage() -> str:
    """One line for each program."""
    lines = (f"  {name:<9} {what}" for name, (_, what) in PROGRAMS.items())
    return "\n".join(
        ["usage: megatron-star PROGRAM [options]", "", *lines, "", "PROGRAM --help lists options."]
    )


def main(argv: list[str] | None = None) -> None:
    """Run the program that the first argument names, with the rest, as `python -m` would."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in PROGRAMS:
        print(f"error: no program {name!r}: one of {', '.join(PROGRAMS)}", file=sys.stderr)
        sys.exit(USAGE_STATUS)
    sys.argv = [f"megatron-star {name}", *rest]
    runpy.run_module(PROGRAMS[name][0], run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
