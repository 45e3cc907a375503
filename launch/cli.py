"""The command `megatron-star`: every program of this project by name, for people who do not want paths.

megatron-star convert --hf DIR --output DIR
torchrun --no-python --nproc-per-node 2 megatron-star generate --load DIR --context-parallel-size 2 ...
"""

import runpy
import sys

PROGRAMS = {
    "generate": ("launch.generate", "ask questions about documents (on the ranks of torchrun or srun)"),
    "serve": ("launch.run_text_generation_server", "serve over HTTP (on the ranks of torchrun or srun)"),
    "convert": ("checkpoints_tools.convert_hf_to_megatron", "a Hugging Face checkpoint to Megatron"),
    "verify": ("checkpoints_tools.verify", "compare a Megatron checkpoint with its source"),
    "eval": ("launch.evaluate", "score settings on RULER's tasks (on the ranks of torchrun or srun)"),
    "report": ("launch.report", "tables and pictures of what eval has measured"),
    "calibrate": (
        "launch.calibrate",
        "the cheapest setting for your own data (on the ranks of torchrun or srun)",
    ),
    "plan": ("launch.plan", "which GPUs a model and a context need, and how fast they are"),
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
