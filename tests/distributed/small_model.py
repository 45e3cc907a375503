"""The smallest model that tests of KV and of counted work build, in Megatron's argument names."""

SMALL = {
    "hidden_size": 24,
    "ffn_hidden_size": 32,
    "num_attention_heads": 3,
    "group_query_attention": True,
    "num_query_groups": 1,
    "kv_channels": 8,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "padded_vocab_size": 257,
    "max_position_embeddings": 512,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
}
