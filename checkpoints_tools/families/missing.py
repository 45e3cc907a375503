"""Families that cannot be converted, each with a feature of theirs that is not computed here."""

_FAMILIES = {
    "its experts": (
        *("afmoe", "aria_text", "axk2", "cohere2_moe", "dbrx", "dots1", "exaone_moe"),
        *("flex_olmo", "granitemoe_swa", "granitemoeshared", "hunyuan_v1_moe", "hy_v3"),
        *("jetmoe", "kolibri1", "laguna", "mellum", "mimo_v2_flash", "minimax_m2", "phimoe", "solar_open"),
    ),
    "scales of latents, and two attentions in a layer": ("longcat_flash",),
    "a norm after experts, and none after dense layers": ("axk1",),
    "latent attention whose queries are scaled by their position": ("mistral4",),
    "sparse attention to the tokens that an indexer (DSA) chooses; exact attention without the indexer is "
    "another model": (*("deepseek_v32", "deepseek_v4", "glm5_next", "glm_moe_dsa", "hy_v4"),),
    "layers with a state (Mamba, linear attention)": (
        *("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "jamba", "kimi_linear", "mamba", "mamba2"),
        *("minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_next"),
        *("recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"),
    ),
    "convolutions": ("lfm2", "lfm2_moe", "lfm3"),
    "ALiBi": ("bloom", "mpt"),
    "learned position embeddings": ("biogpt", "gpt2", "gpt_bigcode", "gpt_neo", "opt", "xglm"),
    "attention and MLP side by side with a norm each": ("falcon", "gpt_neox"),
    "a bias of the output layer": ("codegen", "ctrl", "gptj", "phi"),
    "norms without weights": ("dory", "nanochat", "olmo"),
    "a norm of the embeddings": ("modernbert-decoder",),
    "an output layer of fewer words than the embedding": ("apertus1p5_text",),
    "LayerNorm of queries and keys": ("persimmon",),
    "differential attention": ("diffllama",),
    "masks that depend on the values": ("doge",),
    "ternary weights": ("bitnet",),
    "LoRA adapters for images and speech": ("phi4_multimodal", "phi4mm"),
    "embeddings for each layer": ("gemma3n", "gemma3n_text"),
}
MISSING: dict[str, str] = {name: feature for feature, names in _FAMILIES.items() for name in names}
"""The feature, by `model_type`. Of what stands nowhere nothing is known."""
