"""Packaging of megatron-star; every dependency is bounded here and nowhere else."""

from setuptools import find_packages, setup

setup(
    name="megatron-star",
    version="0.1.0",
    description="Context-parallel long-context inference (Star Attention) for Megatron-Core",
    entry_points={"console_scripts": ["megatron-star = megatron_star.programs.cli:main"]},
    python_requires=">=3.12,<3.14",  # megatron-core 0.19 has no wheel for 3.14
    packages=find_packages(include=["megatron_star*", "checkpoints_tools*"]),
    package_data={
        "megatron_star.attention": ["quantised_cpu.cpp"],
        "megatron_star.server": ["page.html"],
        "megatron_star.speed": ["few_rows_attention.cpp"],
    },
    install_requires=[
        "megatron-core>=0.19,<0.20",
        "torch>=2.11,<2.15",
        "transformers>=5.0,<6",
        "safetensors>=0.5,<1",
        "tqdm>=4.66,<5",
        "pyyaml>=6,<7",
        "numpy>=1.26,<3",
        "jinja2>=3.1,<4",
        "pydantic>=2.10,<3",
        "fastapi>=0.120,<1",
        "starlette>=0.40,<2",
        "h11>=0.14,<1",
        "uvicorn>=0.35,<1",
        "prometheus-client>=0.22,<1",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.20,<3"],
        "flash-attn": ["flash-attn>=2.7,<3"],
        "flash-attn-3": ["fa3-fwd>=0.0.3,<0.1"],
        "demo": ["gguf>=0.17,<1"],
        "otel": ["opentelemetry-sdk>=1.40,<2", "opentelemetry-exporter-otlp-proto-http>=1.40,<2"],
        "eval": ["matplotlib>=3.9,<4"],
        "dev": [
            "accelerate>=1,<2",
            "flask>=3,<4",
            "flask-restful>=0.3.10,<0.4",
            "gguf>=0.17,<1",
            "httpx>=0.28,<1",
            "lm-eval[api]>=0.4.9,<0.5",
            "matplotlib>=3.9,<4",
            "openai>=2,<4",
            "opentelemetry-exporter-otlp-proto-http>=1.40,<2",
            "opentelemetry-sdk>=1.40,<2",
            "playwright>=1.50,<2",
            "pytest>=8,<10",
            "schemathesis>=4,<5",
            "ruff>=0.15,<0.18",
            "triton>=3.6,<4; sys_platform == 'linux'",
        ],
    },
)
