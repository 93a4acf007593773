"""Use the layer spec in a plain Megatron-Core GPTModel: what `pretrain_gpt.py --spec` does, in twenty lines.

Usage: python examples/06_layer_spec_in_your_own_megatron.py
"""

import torch

from megatron_qwen import ParallelLayout, QwenConfig, get_qwen_layer_spec
from megatron_qwen.parallel import groups
from megatron_qwen.testing.tiny import tiny_moe


def logits_of(config: QwenConfig, tokens_BS: torch.Tensor) -> torch.Tensor:
    from megatron.core.models.gpt import GPTModel  # after groups.initialize: it prepares the device

    transformer_config = config.to_transformer_config(dtype=torch.float32)
    model = GPTModel(
        config=transformer_config,
        transformer_layer_spec=get_qwen_layer_spec(transformer_config),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=int(config.rope_theta),
        share_embeddings_and_output_weights=config.tie_word_embeddings,
    )
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    with torch.no_grad():
        return model.eval()(tokens_BS, positions_BS, None)


def main() -> None:
    groups.initialize(ParallelLayout(), seed=1)
    config = tiny_moe()
    logits_BSV = logits_of(config, torch.randint(config.vocab_size, (2, 16)))
    print(f"a Qwen MoE inside a plain GPTModel: logits {tuple(logits_BSV.shape)}")
    groups.shutdown()


if __name__ == "__main__":
    main()
