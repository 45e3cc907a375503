"""HTTP on the driver: Megatron's wire, OpenAI's wire, health, metrics and one page."""
