"""A character language model of charlm for Hugging Face's transformers; it needs no charlm.

AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .networks_charlm import build_network, logits_of


class CharlmConfig(PretrainedConfig):
    """`network` has the arguments of `networks_charlm.build_network`."""

    model_type = "charlm"

    def __init__(self, network: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.network = network or {}
        self.vocab_size = self.network.get("vocab_size", 0)
        self.num_hidden_layers = 0  # of the cache that `generate` may make; the networks use none
        super().__init__(**kwargs)


class CharlmForCausalLM(PreTrainedModel, GenerationMixin):
    """Predicts the next character of texts that begin with the start token."""

    config_class = CharlmConfig
    main_input_name = "input_ids"

    def __init__(self, config: CharlmConfig) -> None:
        super().__init__(config)
        self.network = build_network(**config.network)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Computes the logits of the next token at each position, from the last block_size tokens up to it.

        Args:
            input_ids: (B, t) int64, any t.
            attention_mask: (B, t), 0 for padding at the beginning or the end of a row, otherwise 1.
            labels: (B, t) int64, the tokens of input_ids, of which -100 are not predicted; their mean loss, in nats, is
                computed.
            return_dict: False returns a tuple.
        """
        t = input_ids.shape[1]
        if attention_mask is None:
            logits = logits_of(self.network, input_ids)  # (B, t, V)
        else:  # each row begins behind its padding, which is moved to the end, where no other position sees it
            padding = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)  # (B, 1)
            at = torch.arange(t, device=input_ids.device)
            logits = logits_of(self.network, input_ids.gather(1, (at + padding) % t))
            logits = logits.gather(1, ((at - padding) % t)[:, :, None].expand_as(logits))
        loss = None if labels is None else cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        output = CausalLMOutput(loss=loss, logits=logits)
        return output if return_dict else output.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The last block_size tokens: more are not seen."""
        T = self.network.block_size
        return {
            "input_ids": input_ids[:, -T:],
            "attention_mask": None if attention_mask is None else attention_mask[:, -T:],
        }
