"""Attention over a part of the keys, with its log-sum-exp, and the merge of such partial results.

Shapes in this package: b batch, np query heads, ng KV heads (np % ng == 0), sq query rows, sk keys, hn head
size of queries and keys, hv that of values: hn, but in latent attention.
"""
