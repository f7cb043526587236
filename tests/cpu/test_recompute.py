"""`--recompute-granularity auto`: the arithmetic. That recomputed layers train the same is shown with the trainer's own tests."""

from __future__ import annotations

from rlmono.trainer.recompute import GIB, layer_bytes, layers_to_recompute, logits_bytes

FOUR_B = dict(hidden_size=2560, kv_channels=128, num_attention_heads=32, num_query_groups=8, ffn_hidden_size=9728, vocab_size=151936, num_layers=36)


def test_bytes_of_a_layer() -> None:
    one = layer_bytes(FOUR_B, 8192, 1, False, 2)
    assert one == 8192 * 2 * (5 * 2560 + (4096 + 2 * 1024) + 2 * (4096 + 1024) + 4096 + 3 * 9728)
    assert 34 < 36 * one / GIB < 36
    assert layer_bytes(FOUR_B, 8192, 2, True, 2) * 2 == one and one / 2 < layer_bytes(FOUR_B, 8192, 2, False, 2) < one
    assert logits_bytes(FOUR_B, 8192, 1, 2) > 8192 * 151936 * 4


def test_no_more_layers_than_memory_asks() -> None:
    def needed(n: int) -> int:
        return 3 + 10 + (36 - n) * 10 + n * 1       # logits, one layer at a time, layers that are kept, inputs of the others
    for free in (50, 60, 100, 200, 300, 400, 1000):
        n = layers_to_recompute(free, 36, 10, 3, 1)
        assert n == 36 or needed(n) <= free * 0.92
        assert n == 0 or needed(n - 1) > free * 0.92
    assert layers_to_recompute(1000, 36, 10, 3, 1) == 0 and layers_to_recompute(10, 36, 10, 3, 1) == 36
    assert layers_to_recompute(500, 36, 10, 3, 1, in_flight=2) > layers_to_recompute(500, 36, 10, 3, 1) == 0
