"""`generate`: all members write one text, token by token, from their mixture.

It is transformers' own `generate` on the network inside, with R rows, so that every decoding strategy, logits
processor, stopping criterion and streamer keeps its meaning; what a forward pass does meanwhile is in `networks`.

Shapes: B prompts, R = B · (beams or return sequences) rows, T tokens, N of them new.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList
from transformers.utils.generic import ModelOutput

from bayesify.batch import map_tensors
from bayesify.errors import DataError
from bayesify.generation.doubt import Doubt
from bayesify.generation.networks import Networks
from bayesify.generation.support import check_supported
from bayesify.modes import evaluating

if TYPE_CHECKING:
    from bayesify.model import BayesianModel

_OF_EACH_NETWORK = (
    "attentions", "hidden_states", "cross_attentions", "decoder_attentions", "decoder_hidden_states",
    "encoder_attentions", "encoder_hidden_states",
)  # fmt: skip


@dataclass
class Generation(ModelOutput):
    """What `generate` wrote, and how sure it was of each token.

    Attributes:
        sequences: [rows, T] tokens; rows are B prompts times the sequences returned of each. Without an encoder, they
            begin with the prompt.
        entropy: [rows, N] of the mixture from which each new token was chosen, in nats: all of the doubt.
        mutual_information: [rows, N] the part of it on which the members disagree, in nats.

    Both are NaN after the end of a sequence, so `nanmean(1)` is the doubt of a text. They are of the
    networks' probabilities, before temperature, top-k and other logits processors.

    The others are there where `return_dict_in_generate` asks for them, and as transformers has them: `logits` are of
    the mixture; attentions and hidden states are averaged over networks; `past_key_values` holds a row for each network
    (member-major), and can be handed to the next call with the same `samples` and `seed`.
    """

    sequences: Tensor | None = None
    entropy: Tensor | None = None
    mutual_information: Tensor | None = None
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Any, ...] | None = None
    cross_attentions: tuple[Any, ...] | None = None
    decoder_hidden_states: tuple[Any, ...] | None = None
    past_key_values: Cache | None = None


def generate(
    bnn: BayesianModel,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    samples: int | None = None,
    seed: int | None = None,
    **options: Any,
) -> Generation:
    """Text of which every token comes from the average of all networks' probabilities, given the text so far.

    Greedy search, sampling (one draw for all networks), and beam search with or without sampling; in eval mode and
    without gradients. The rows of one prompt (its beams, its return sequences) share one draw of the factors, which
    holds for the whole text and is that of `predict` with the same seed.

    Args:
        inputs, generation_config, options: as transformers' `generate` takes them, prompts padded on the left.
        samples: S draws a member, so that K·S networks are averaged; `None` takes the posterior means.
        seed: makes the draws of the factors reproducible, not those of tokens, which follow `torch.manual_seed`;
            `None` takes one from torch's global generator.

    Raises:
        BayesifyError: the model writes no text, or not in a way that can be averaged.
        DataError: an option or input asks for what is not supported with several networks.
    """
    if samples is not None and samples < 1:
        raise DataError(f"samples must be at least 1; found {samples}.")
    model: Any = bnn.model
    config = check_supported(bnn, generation_config, options)
    if samples is not None and seed is None:
        seed = int(torch.randint(2**62, ()))
    doubt = Doubt()
    options["logits_processor"] = LogitsProcessorList([*(options.get("logits_processor") or []), doubt])
    internal = {"return_dict_in_generate": True, "disable_compile": True}
    if generation_config is None:
        options |= internal
    else:
        generation_config = copy.deepcopy(generation_config)
        generation_config.update(**internal)
        options = {name: value for name, value in options.items() if name not in internal}
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    networks = Networks(bnn, samples, seed, copies, doubt)

    def write() -> Any:
        with evaluating(bnn), torch.no_grad(), networks.running():
            return model.generate(inputs, generation_config, **options)

    output = bnn.settled(write, kwargs=_first_call(model, inputs, options))
    entropy, mutual_information = doubt.of_tokens(
        output.sequences, output.get("beam_indices"), config.eos_token_id, config.pad_token_id
    )
    wanted = output if config.return_dict_in_generate else {"sequences": output.sequences}
    kept = {
        name: map_tensors(value, networks.mean) if name in _OF_EACH_NETWORK else value for name, value in wanted.items()
    }
    return Generation(**kept, entropy=entropy, mutual_information=mutual_information)


def _first_call(model: Any, inputs: Tensor | None, options: dict[str, Any]) -> dict[str, Any]:
    """Inputs of one call of the network with the prompts, to see where the batch is in each layer."""
    call = {name: value for name, value in options.items() if isinstance(value, Tensor)}
    main = str(model.main_input_name)
    if inputs is not None:
        call[main] = inputs
    if main not in call and "inputs_embeds" not in call:
        call[main] = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    if model.config.is_encoder_decoder and "decoder_input_ids" not in call:
        rows = len(next(call[name] for name in (main, "inputs_embeds") if name in call))
        call["decoder_input_ids"] = torch.ones(rows, 1, dtype=torch.int64, device=model.device)
    return call
